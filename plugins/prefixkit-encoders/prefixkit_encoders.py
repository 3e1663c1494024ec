"""prefixkit's plugin for encoders whose attention is not on transformers' attention interface.

Each ``site_forward`` below stands in for the ``forward`` of one attention class while there is a
prefix: it projects as that ``forward`` does, and leaves the rest to :func:`attend`. Biases of
positions go into the mask, which has zeros in the prefix's columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import prefixkit
from prefixkit import (
    Adapter,
    EngineError,
    PositionIds,
    Site,
    Stack,
    UnsupportedModelError,
    find_stack,
    hookimpl,
    join_path,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def attend(module, query, key, value, mask=None):
    """Softmax attention with the prefix in front.

    Args:
        module: The attention module.
        query: ``(batch, heads, queries, dim)``, scaled.
        key: ``(batch, heads, keys, dim)``.
        value: ``(batch, heads, keys, dim)``.
        mask: Added to the scores: ``(batch or 1, heads or 1, queries or 1, keys)``.

    Returns:
        ``(batch, queries, heads × dim)``, and the probabilities after dropout.
    """
    from torch.nn import functional

    key, value, mask = prefixkit.in_front(module, key, value, mask)
    scores = query @ key.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    weights = functional.softmax(scores, dim=-1)
    share = module.dropout if isinstance(module.dropout, float) else module.dropout.p
    weights = functional.dropout(weights, share, module.training)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def heads(module, states):
    """``(batch, tokens, heads × dim)`` as ``(batch, heads, tokens, dim)``."""
    return states.unflatten(-1, (-1, head_dim(module))).transpose(1, 2)


def head_dim(module):
    """Size of one head."""
    return module.head_dim if hasattr(module, "head_dim") else module.attention_head_size


def project(module, states, names=("query", "key", "value")):
    """Scaled query, key and value of ``states``."""
    query, key, value = (heads(module, getattr(module, name)(states)) for name in names)
    return query / head_dim(module) ** 0.5, key, value


def both(mask, bias):
    """A mask and a bias in one; without a mask, the bias."""
    return bias if mask is None else mask + bias


def refuse_given(**arguments):
    """Refuse what belongs to a decoder or to a way of calling that nobody uses."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise EngineError(f"{', '.join(given)}: not served with a prefix in this encoder")


def bert(
    module,
    hidden_states,
    attention_mask=None,
    *,
    encoder_hidden_states=None,
    past_key_values=None,
    cache=None,  # the same from transformers 5.24 on
    **_,
):
    """Megatron-BERT, RemBERT, BigBird."""
    refuse_given(encoder_hidden_states=encoder_hidden_states, past_key_values=past_key_values, cache=cache)
    return attend(module, *project(module, hidden_states), attention_mask)


def roformer(
    module,
    hidden_states,
    attention_mask=None,
    *,
    sinusoidal_pos=None,
    encoder_hidden_states=None,
    past_key_values=None,
    cache=None,  # the same from transformers 5.24 on
    **_,
):
    """RoFormer: keys, and values where the config says so, are rotated before the prefix joins."""
    refuse_given(encoder_hidden_states=encoder_hidden_states, past_key_values=past_key_values, cache=cache)
    query, key, value = project(module, hidden_states)
    if attention_mask is not None:
        # Counted without padding, so that the prefix is as far from a padded row as from the row alone.
        seen = (attention_mask[:, 0] == 0).any(-2)
        sinusoidal_pos = sinusoidal_pos[0, 0, (seen.cumsum(-1) - 1).clamp(min=0)].unsqueeze(1)
    if module.rotary_value:
        query, key, value = module.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
    else:
        query, key = module.apply_rotary_position_embeddings(sinusoidal_pos, query, key)
    return attend(module, query, key, value, attention_mask)


def convbert(module, hidden_states, attention_mask=None, encoder_hidden_states=None, **_):
    """ConvBERT: beside the attention stands a convolution, which the prefix does not touch."""
    import torch

    refuse_given(encoder_hidden_states=encoder_hidden_states)
    own = type(module).forward(module, hidden_states, attention_mask)[0]
    context, weights = attend(module, *project(module, hidden_states), attention_mask)
    return torch.cat([context, own[..., context.shape[-1] :]], dim=-1), weights


def luke(module, word_hidden_states, entity_hidden_states, attention_mask=None, output_attentions=False):
    """LUKE: words and entities in one row, with a query of its own for each pair of kinds; the prefix is words."""
    import torch
    from torch.nn import functional

    words = word_hidden_states.shape[1]
    if entity_hidden_states is None:
        context, weights = attend(module, *project(module, word_hidden_states), attention_mask)
        return (context, None, weights) if output_attentions else (context, None)
    states = torch.cat([word_hidden_states, entity_hidden_states], dim=1)
    query, key, value = project(module, states)
    if module.use_entity_aware_attention:
        kinds = ((module.query, module.e2w_query), (module.w2e_query, module.e2e_query))
        parts = (word_hidden_states, entity_hidden_states)
        to_words, to_entities = (
            heads(module, torch.cat([ask(part) for ask, part in zip(kind, parts, strict=True)], dim=1))
            / head_dim(module) ** 0.5
            for kind in kinds
        )
        query = to_words
        more = (to_entities - to_words) @ key[:, :, words:].transpose(-1, -2)
        attention_mask = both(attention_mask, functional.pad(more, (words, 0)))
    context, weights = attend(module, query, key, value, attention_mask)
    split = (context[:, :words], context[:, words:])
    return (*split, weights) if output_attentions else split


def mpnet(module, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **_):
    """MPNet: a bias of relative positions, computed once by the encoder."""
    query, key, value = project(module, hidden_states, "qkv")
    context, weights = attend(module, query, key, value, both(attention_mask, position_bias))
    output = module.o(context)
    return (output, weights) if output_attentions else (output,)


def mpnet_bias(stack, query_positions, num_virtual_tokens):
    """Bias of the prefix's columns, ``(batch or 1, heads, queries, num_virtual_tokens)``."""
    import torch

    encoder = stack.encoder
    columns = torch.arange(num_virtual_tokens, device=query_positions.device)
    buckets = encoder.relative_position_bucket(columns - query_positions[..., None])
    table = encoder.relative_attention_bias
    # Offloaded, the table comes back within its own call, which moves its arguments itself.
    buckets = buckets if table.weight.is_meta else buckets.to(table.weight.device)
    return table(buckets).permute(0, 3, 1, 2)


def deberta(
    module,
    hidden_states,
    attention_mask,
    *,
    output_attentions=False,
    query_states=None,
    relative_pos=None,
    rel_embeddings=None,
):
    """DeBERTa: content and position disentangled; the prefix has content only, as in P-tuning v2's code."""
    refuse_given(query_states=query_states)
    query, key, value = module.transpose_for_scores(module.in_proj(hidden_states)).chunk(3, dim=-1)
    terms = 1 + len(module.pos_att_type)
    query = (query + module.transpose_for_scores(module.q_bias[None, None, :])) / (query.shape[-1] * terms) ** 0.5
    value = value + module.transpose_for_scores(module.v_bias[None, None, :])
    bias = query.new_zeros(())
    if module.relative_attention:
        embeddings = module.pos_dropout(rel_embeddings)
        bias = module.disentangled_att_bias(query, key, relative_pos, embeddings, terms)
    context, weights = attend(module, query, key, value, hiding(attention_mask, bias))
    return context, weights if output_attentions else None


def deberta_v2(
    module,
    hidden_states,
    attention_mask,
    *,
    output_attentions=False,
    query_states=None,
    relative_pos=None,
    rel_embeddings=None,
):
    """DeBERTa-v2 and v3; as :func:`deberta`."""
    asking = hidden_states if query_states is None else query_states
    states = (module.query_proj(asking), module.key_proj(hidden_states), module.value_proj(hidden_states))
    query, key, value = (heads(module, projected) for projected in states)
    terms = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    bias = query.new_zeros(())
    if module.relative_attention:
        embeddings = module.pos_dropout(rel_embeddings)
        bias = module.disentangled_attention_bias(
            query.flatten(0, 1), key.flatten(0, 1), relative_pos, embeddings, terms
        )
        bias = bias.unflatten(0, query.shape[:2])
    query = query / (query.shape[-1] * terms) ** 0.5
    context, weights = attend(module, query, key, value, hiding(attention_mask, bias))
    return context, weights if output_attentions else None


def hiding(seen, bias):
    """``bias`` where ``seen (batch, 1, queries, keys)`` is not zero, and the smallest number elsewhere."""
    import torch

    return torch.where(seen.bool(), bias, torch.finfo(bias.dtype).min)


def squeezebert(module, hidden_states, attention_mask, output_attentions):
    """SqueezeBERT: channels before tokens."""
    states = (ask(hidden_states).transpose(1, 2) for ask in (module.query, module.key, module.value))
    query, key, value = (heads(module, projected) for projected in states)
    context, weights = attend(module, query / head_dim(module) ** 0.5, key, value, attention_mask)
    result = {"context_layer": context.transpose(1, 2)}
    # The scores, but for a constant.
    return {**result, "attention_score": weights.log()} if output_attentions else result


def ibert(module, hidden_states, hidden_states_scaling_factor, attention_mask=None, output_attentions=False):
    """I-BERT in full precision: its activations watch the ranges of what passes."""
    watched = ("query", "key", "value")
    query, key, value = (
        heads(
            module,
            getattr(module, f"{name}_activation")(*getattr(module, name)(hidden_states, hidden_states_scaling_factor))[
                0
            ],
        )
        for name in watched
    )
    context, weights = attend(module, query / head_dim(module) ** 0.5, key, value, attention_mask)
    context, _ = module.output_activation(context)
    return ((context, weights), (None, None)) if output_attentions else ((context,), (None,))


def xlm(module, input, mask, *, kv=None, cache=None, output_attentions=False, **_):  # noqa: A002 - the model's own name
    """XLM and FlauBERT."""
    refuse_given(kv=kv)
    query, key, value = project(module, input, ("q_lin", "k_lin", "v_lin"))
    if cache is not None:
        own = getattr(cache, "self_attention_cache", cache)
        key, value = own.update(key, value, module.layer_id)
    seen = mask[:, None] if mask.ndim == 3 else mask[:, None, None]
    context, weights = attend(module, query, key, value, hiding(seen, query.new_zeros(())))
    output = module.out_lin(context)
    return (output, weights) if output_attentions else (output,)


def layoutlmv3(module, hidden_states, attention_mask=None, rel_pos=None, rel_2d_pos=None, **_):
    """LayoutLMv3: two biases of positions."""
    query, key, value = project(module, hidden_states)
    given = ((module.has_relative_attention_bias, rel_pos), (module.has_spatial_attention_bias, rel_2d_pos))
    for has, bias in given if module.has_relative_attention_bias else ():
        attention_mask = both(attention_mask, bias / head_dim(module) ** 0.5) if has else attention_mask
    return attend(module, query, key, value, attention_mask)


def bros(module, hidden_states, bbox_pos_emb, attention_mask=None, *, encoder_hidden_states=None, **_):
    """BROS: a bias of the boxes' distances."""
    import torch

    refuse_given(encoder_hidden_states=encoder_hidden_states)
    query, key, value = project(module, hidden_states)
    boxes = bbox_pos_emb.view(query.shape[2], query.shape[2], query.shape[0], query.shape[3]).permute(2, 0, 1, 3)
    bias = torch.einsum("bnid,bijd->bnij", query, boxes)
    return attend(module, query, key, value, both(attention_mask, bias))


def lilt(module, hidden_states, layout_inputs, attention_mask=None, output_attentions=False):
    """LiLT: text and layout score together; the prefix is text, and the layout's own sums are without it."""
    own = type(module).forward(module, hidden_states, layout_inputs, attention_mask)
    query, key, value = project(module, hidden_states)
    shrink = module.channel_shrink_ratio
    asks, answers = (
        module.transpose_for_scores(of(layout_inputs), r=shrink) for of in (module.layout_query, module.layout_key)
    )
    bias = asks @ answers.transpose(-1, -2) / (head_dim(module) // shrink) ** 0.5
    context, weights = attend(module, query, key, value, both(attention_mask, bias))
    return (context, own[1], weights) if output_attentions else (context, own[1])


def visual_bert(module, hidden_states, attention_mask=None, output_attentions=False):
    """VisualBERT."""
    context, weights = attend(module, *project(module, hidden_states), attention_mask)
    return (context, weights) if output_attentions else (context,)


class WavLMInFront:
    """A WavLM attention whose sums have the prefix in front; all else, its gated bias too, is the module's."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def torch_multi_head_self_attention(self, hidden_states, attention_mask, gated_position_bias, *_):
        """As the module's own, given ``(batch, tokens)`` with 1 for what is seen and the bias by row and head.

        Older versions of transformers say as well whether weights are wanted.
        """
        query, key, value = project(self.module, hidden_states, ("q_proj", "k_proj", "v_proj"))
        bias = gated_position_bias.unflatten(0, query.shape[:2])
        if attention_mask is not None:
            bias = hiding(attention_mask[:, None, None] == 1, bias)
        context, weights = attend(self.module, query, key, value, bias)
        return self.module.out_proj(context), weights


def wavlm(module, hidden_states, attention_mask=None, position_bias=None, index=0, **_):
    """WavLM: a gated bias of distances."""
    return type(module).forward(WavLMInFront(module), hidden_states, attention_mask, position_bias, index=index)


@dataclass(frozen=True)
class Family:
    """What the encoders here differ in.

    Attributes:
        site_forward: Stands in for the attention's forward.
        attention: The attention module, within a layer.
        layers: The layers, within the stack.
        positions: How the stack counts, given its config.
    """

    site_forward: Callable[..., Any]
    attention: str = "attention.self"
    layers: str = "encoder.layer"
    positions: Callable[[Any], PositionIds | None] = lambda config: PositionIds(limit=config.max_position_embeddings)


def behind_padding(config, padding=None):
    """Ids of tokens start behind that of the padding, the config's unless another is given."""
    first = (config.pad_token_id if padding is None else padding) + 1
    return PositionIds(limit=config.max_position_embeddings - first, offset=first)


def mpnet_positions(config):
    """Positions both in a table and as a bias; the model takes 1 for its padding, whatever its config says."""
    from dataclasses import replace

    return replace(behind_padding(config, padding=1), prefix_bias=mpnet_bias)


def deberta_positions(config):
    """Few DeBERTas have a table of positions; the distances of the rest have no place for a prefix."""
    has_table = getattr(config, "position_biased_input", True)
    return PositionIds(limit=config.max_position_embeddings) if has_table else None


def uncounted(_):
    """No positions, or none that could be moved."""


FAMILIES = {
    "deberta": Family(deberta, positions=deberta_positions),
    "deberta-v2": Family(deberta_v2, positions=deberta_positions),
    "mpnet": Family(mpnet, attention="attention.attn", positions=mpnet_positions),
    "roformer": Family(roformer, positions=uncounted),
    "megatron-bert": Family(bert),
    "rembert": Family(bert),
    "luke": Family(luke, positions=behind_padding),
    "convbert": Family(convbert),
    "squeezebert": Family(squeezebert, attention="attention", layers="encoder.layers"),
    "ibert": Family(ibert, positions=behind_padding),
    "xlm": Family(xlm, attention="", layers="attentions"),
    "flaubert": Family(xlm, attention="", layers="attentions"),
    "big_bird": Family(bert),
    "layoutlmv3": Family(layoutlmv3, positions=behind_padding),
    "bros": Family(bros),
    "lilt": Family(lilt, positions=behind_padding),
    "visual_bert": Family(visual_bert),
    "wavlm": Family(wavlm, attention="attention", layers="encoder.layers", positions=uncounted),
}


HEADS = ("num_attention_heads", "num_heads", "n_heads")
"""Under which names attention modules keep their number of heads."""


def stacks(model, families=FAMILIES):
    """Yield the encoder of any task class."""
    config = model.config
    family = families[config.model_type]
    refuse_variants(config)
    path = find_stack(model, f"{family.layers}.0")
    count = len(model.get_submodule(join_path(path, family.layers)))
    paths = [join_path(path, f"{family.layers}.{layer}", family.attention) for layer in range(count)]
    modules = [model.get_submodule(name) for name in paths]
    sites = tuple(
        Site(
            path=name,
            stack="encoder",
            layer=layer,
            kv_heads=next(getattr(module, name) for name in HEADS if hasattr(module, name)),
            key_dim=head_dim(module),
            value_dim=head_dim(module),
        )
        for layer, (name, module) in enumerate(zip(paths, modules, strict=True))
    )
    positions = family.positions(config)
    yield Stack(name="encoder", path=path, positions=positions, sites=sites, site_forward=family.site_forward)


REFUSED = {
    "is_decoder": (True, "as a decoder it is not served; use is_decoder=False"),
    "causal": (True, "as a decoder it is not served; use causal=False"),
    "talking_head": (True, "talking heads mix the columns of the prefix; use talking_head=False"),
    "quant_mode": (True, "integers leave no place for a trained prefix; use quant_mode=False"),
    "attention_type": (
        "block_sparse",
        "in sparse blocks a prefix has no place; set attention_type='original_full' in the config",
    ),
}
"""Settings of a config under which there is no adapter."""


def refuse_variants(config):
    """Refuse what has another attention.

    Raises:
        UnsupportedModelError: If the config asks for it.
    """
    for name, (value, reason) in REFUSED.items():
        if getattr(config, name, None) == value:
            raise UnsupportedModelError(f"{config.model_type} with {name}={value!r}: {reason}")


@hookimpl
def prefixkit_adapters():
    """Encoders by family."""
    yield Adapter(model_types=tuple(FAMILIES), stacks=stacks)
