"""prefixkit's plugin for decoders whose attention is not on transformers' attention interface.

Most of them take a cache and attend to what it gives back, so the prefix enters there. Those with a linear
bias (ALiBi) need the bias of the prefix's columns as well, and two need an attention of their own.
"""

import prefixkit
from prefixkit import Adapter, PositionIds, RelativeBias, Site, Stack, find_stack, hookimpl, join_path


def transformers_is(version):
    """Whether transformers is of that version or a later one."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version(version)


def slopes_of(module, alibi):
    """The slopes of a BLOOM's or Falcon's bias, one for each head, as the model itself rounds them."""
    import sys

    import torch

    build = sys.modules[type(module).__module__].build_alibi_tensor
    two_tokens = torch.ones(1, 2, dtype=torch.long, device=alibi.device)
    return build(two_tokens, module.num_heads, alibi.dtype)[:, 0, 1]


def bloom_attention(module, hidden_states, residual, alibi, attention_mask, **options):
    """BLOOM counts its bias from the mask: padding is no distance."""
    alibi = alibi.view(len(hidden_states), module.num_heads, 1, -1)
    alibi = prefixkit.alibi_in_front(module, alibi, slopes_of(module, alibi)).flatten(0, 1)
    return prefixkit.through_cache(module, hidden_states, residual, alibi, attention_mask, **options)


def falcon_attention(module, hidden_states, alibi, attention_mask, **options):
    """Falcon with a linear bias has it in the mask, scaled; eager attention adds it once more.

    The prefix has all of its bias in the mask, since the other place has no room for one by query.
    """
    import torch

    if alibi is None:
        return prefixkit.through_cache(module, hidden_states, alibi, attention_mask, **options)
    once = module.config._attn_implementation == "sdpa" and not options.get("output_attentions")
    slopes = slopes_of(module, alibi) * module.inv_norm_factor * (1 if once else 2)
    mask = prefixkit.alibi_in_front(module, attention_mask, slopes)
    alibi = torch.nn.functional.pad(alibi, (mask.shape[-1] - alibi.shape[-1], 0))
    return prefixkit.through_cache(module, hidden_states, alibi, mask, mask_name=None, **options)


def mpt_attention(module, hidden_states, position_bias, past_key_values=None, attention_mask=None, *, cache=None, **_):
    """MPT counts its bias from the last place of the cache; here it is counted from each row's first token."""
    import torch

    past_key_values = past_key_values if cache is None else cache  # its name from transformers 5.24 on

    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = (*hidden_states.shape[:2], module.n_heads, module.head_dim)
    query, key, value = (part.reshape(heads).transpose(1, 2) for part in mixed.chunk(3, dim=2))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    first = (~attention_mask).any(dim=(1, 2)).int().argmax(-1)
    places = torch.arange(key.shape[2], device=key.device) - first[:, None]
    alibi = prefixkit.alibi_in_front(module, slopes[:, None, None] * places[:, None, None], slopes)
    key, value, seen = prefixkit.in_front(module, key, value, ~attention_mask)
    scores = query @ key.transpose(-1, -2) * module.softmax_scale + alibi
    weights = scores.masked_fill(~seen, torch.finfo(query.dtype).min).float().softmax(-1).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, module.attn_dropout_p, module.training)
    return module.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights


def gpt_neo_attention(module, hidden_states, attention_mask=None, layer_past=None, **_):
    """GPT-Neo hides what is beyond a local layer's window, which must not hide the prefix."""
    import torch

    projections = (module.q_proj, module.k_proj, module.v_proj)
    sizes = (module.num_heads, module.head_dim)
    query, key, value = (module._split_heads(projection(hidden_states), *sizes) for projection in projections)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_id)
    if module.attention_type == "local":
        places = torch.arange(key.shape[2], device=key.device)
        own = torch.where(attention_mask == 0, places, -1).amax(-1, keepdim=True)  # the last that a query sees
        beyond = places <= own - module.config.window_size
        attention_mask = attention_mask.masked_fill(beyond, torch.finfo(attention_mask.dtype).min)
    key, value, mask = prefixkit.in_front(module, key, value, attention_mask)
    weights = (query.float() @ key.float().transpose(-1, -2) + mask).softmax(-1).to(value.dtype)
    output = module._merge_heads(module.attn_dropout(weights) @ value, *sizes)
    return module.resid_dropout(module.out_proj(output)), weights


def decoder(model, attention, positions, site_forward, *, heads=None, window=None):
    """The one stack of ``model``; ``attention`` is the path of its first layer's attention, from the layers on."""
    path, config = find_stack(model, attention), model.config.get_text_config()
    if path is None:
        return
    queries = config.num_attention_heads
    sites = tuple(
        Site(
            path=join_path(path, attention.replace(".0.", f".{layer}.", 1)),
            stack="decoder",
            layer=layer,
            kv_heads=heads or queries,
            key_dim=config.hidden_size // queries,
            value_dim=config.hidden_size // queries,
            window=window(layer) if window else None,
        )
        for layer in range(config.num_hidden_layers)
    )
    if not transformers_is("5.5"):
        site_forward = None  # the attention is another one there; the cache engine serves it
    yield Stack(name="decoder", path=path, positions=positions, sites=sites, site_forward=site_forward)


def bloom(model):
    """BLOOM: a linear bias."""
    return decoder(model, "h.0.self_attention", RelativeBias(counts_padding=False), bloom_attention)


def mpt(model):
    """MPT: a linear bias that counts padding."""
    return decoder(model, "blocks.0.attn", RelativeBias(), mpt_attention)


def falcon(model):
    """Falcon: rotary positions or a linear bias, and three ways to share keys among heads."""
    config = model.config
    alone = config.multi_query and not config.new_decoder_architecture
    alibi = RelativeBias(counts_padding=False, ignores_ids=True)
    positions = alibi if config.alibi else PositionIds()
    return decoder(model, "h.0.self_attention", positions, falcon_attention, heads=1 if alone else None)


def gptj(model):
    """GPT-J and CodeGen: rotary positions, read off a table; on the interface from transformers 5.24 on."""
    positions = PositionIds(limit=model.config.max_position_embeddings)
    site_forward = None if transformers_is("5.24.dev0") else prefixkit.through_cache
    return decoder(model, "h.0.attn", positions, site_forward)


def gpt_neo(model):
    """GPT-Neo: a learned table of positions, and a window in local layers."""
    config = model.config

    def window(layer):
        return config.window_size if config.attention_layers[layer] == "local" else None

    positions = PositionIds(limit=config.max_position_embeddings)
    return decoder(model, "h.0.attn.attention", positions, gpt_neo_attention, window=window)


def gpt_neox_japanese(model):
    """GPT-NeoX-Japanese: rotary positions."""
    return decoder(model, "layers.0.attention", PositionIds(), prefixkit.through_cache)


def xglm(model):
    """XGLM: a sinusoidal table of positions, which grows by the length of the text and not by that of the prefix."""
    positions = PositionIds(limit=model.config.max_position_embeddings)
    return decoder(model, "layers.0.self_attn", positions, prefixkit.through_cache)


@hookimpl
def prefixkit_adapters():
    """One for each family."""
    yield Adapter(model_types=("bloom",), stacks=bloom)
    yield Adapter(model_types=("falcon",), stacks=falcon)
    yield Adapter(model_types=("mpt",), stacks=mpt)
    yield Adapter(model_types=("gptj", "codegen"), stacks=gptj)
    yield Adapter(model_types=("gpt_neo",), stacks=gpt_neo)
    yield Adapter(model_types=("gpt_neox_japanese",), stacks=gpt_neox_japanese)
    yield Adapter(model_types=("xglm",), stacks=xglm)
