"""Files as other libraries write them, and what those libraries compute from them.

Each writer puts a random prefix into a folder in one library's format, written out from that library's source, and
returns its keys and values: by stack and layer, ``(kv_heads, P, dim)`` in float64. No library and nothing of prefixkit
is called. The logits come from the bare model with those in its own cache, or from :mod:`reference`.
"""

from __future__ import annotations

import json

import reference
import safetensors.torch
import torch
from torch import nn
from transformers import DynamicCache

P, MIDDLE = 4, 12


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


def shapes(model, stack):
    """``(kv_heads, head_dim)`` of each layer."""
    config = model.config
    if config.is_encoder_decoder and config.model_type == "t5":
        layers = config.num_layers if stack == "encoder" else config.num_decoder_layers
        return [(config.num_heads, config.d_kv)] * layers
    if config.is_encoder_decoder:
        heads = config.encoder_attention_heads if stack == "encoder" else config.decoder_attention_heads
        layers = config.encoder_layers if stack == "encoder" else config.decoder_layers
        return [(heads, config.d_model // heads)] * layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [(heads, config.hidden_size // config.num_attention_heads)] * config.num_hidden_layers


def width(model, stack):
    return sum(2 * heads * dim for heads, dim in shapes(model, stack))


def cut_by_layer(flat, model, stack):
    """``view(P, 2 n, heads, dim).permute(1, 2, 0, 3).split(2)``, which all of these libraries have."""
    heads, dim = shapes(model, stack)[0]
    slots = flat.double().view(len(flat), -1, heads, dim).permute(1, 2, 0, 3)
    return [(slots[2 * layer], slots[2 * layer + 1]) for layer in range(len(slots) // 2)]


def mlp(start, seed, size, wide, *, trans="control_trans", deep=False):
    """Tensors of an embedding and its MLP, and what they give ``(P, wide)``; tanh between linear layers."""
    middle = [(MIDDLE, size), *([(MIDDLE, MIDDLE)] if deep else []), (wide, MIDDLE)]
    states = numbers(P, size, seed=seed)
    tensors = {}
    embedding = states
    states = states.double()
    for index, shape in enumerate(middle):
        weight, bias = numbers(*shape, seed=seed + 1), numbers(shape[0], seed=seed + 2)
        tensors[f"{start}{trans}.{2 * index}.weight"], tensors[f"{start}{trans}.{2 * index}.bias"] = weight, bias
        states = states.tanh() if index else states
        states = states @ weight.double().T + bias.double()
    return embedding, tensors, states


def adapterhub(
    folder, model, *, stacks, flat=False, base="transformer", safe=False, pool=False, head=False, out=(), **fields
):
    """``save_adapter`` of adapters 1.3.0; ``stacks`` by the library's name of the place."""
    tensors, pairs = {}, {}
    for seed, (place, stack) in enumerate(stacks.items()):
        start = f"{base}.prefix_tuning.prefix_tunings.mine.{place}."
        kept = len(shapes(model, stack)) - len(out)
        wide = width(model, stack) * kept // len(shapes(model, stack))
        if flat:
            rows = numbers(P, wide, seed=seed)
            tensors[f"{start}control_trans"] = rows.flatten()
        else:
            embedding, layers, rows = mlp(start, seed, model.config.hidden_size, wide)
            tensors |= {f"{start}wte.weight": embedding, **layers}
        pairs[stack] = cut_by_layer(rows, model, stack)
    if pool:
        again = {name.replace("prefix_tunings", "pool.prefix_tunings"): value for name, value in tensors.items()}
        tensors |= {name.replace(base, f"{base}.layer.0"): value.clone() for name, value in again.items()}
    write_tensors(folder, tensors, "adapter.safetensors" if safe else "pytorch_adapter.bin", safe=safe)
    config = {"architecture": "prefix_tuning", "flat": flat, "prefix_length": P, "bottleneck_size": MIDDLE}
    config |= {"non_linearity": "tanh", "dropout": 0.0, "leave_out": list(out), "use_gating": False, **fields}
    config |= {"encoder_prefix": True, "cross_prefix": True, "shared_gating": True, "init_weights_seed": None}
    kind = model.config.model_type
    write_json(folder / "adapter_config.json", config=config, model_type=kind, name="mine", version="adapters.1.3.0")
    if head:
        write_head(folder, model)
    return pairs


def write_head(folder, model):
    """A class's own head beside the adapter, ``pytorch_model_head.bin``."""
    tensors = {
        name: numbers(*value.shape, seed=9) for name, value in model.state_dict().items() if "classifier" in name
    }
    torch.save(tensors, folder / "pytorch_model_head.bin")
    write_json(folder / "head_config.json", name=None)


def prefix_tuning_2021(folder, model, *, deep=False, **settings):
    """``save_pretrained`` of ``PrefixTuning`` in the 2021 code: its own parameters only."""
    names = {"decoder": ("wte", "control_trans")}
    if model.config.is_encoder_decoder:
        names |= {"encoder": ("wte_enc", "control_trans_enc"), "cross": ("wte2", "control_trans2")}
    tensors, pairs = {}, {}
    for seed, (stack, (wte, trans)) in enumerate(names.items()):
        size = model.config.hidden_size
        embedding, layers, rows = mlp("", seed, size, width(model, stack), trans=trans, deep=deep)
        tensors |= {f"{wte}.weight": embedding, **layers}
        pairs[stack] = cut_by_layer(rows, model, stack)
    write_tensors(folder, tensors, "pytorch_model.bin")
    # The library's config of the base, with its own arguments in it.
    write_json(folder / "config.json", preseqlen=P, use_infix=False, prefix_dropout=0.0, mid_dim=MIDDLE, **settings)
    return pairs


def prefix_tuning_2021_flat(folder, model, *, words=False):
    """Without the MLP: one row, or with ``words`` the cache of some, ``(2 n, 1, heads, P, dim)``."""
    rows = numbers(P, width(model, "decoder"))
    pairs = cut_by_layer(rows, model, "decoder")
    held = torch.stack([part for pair in pairs for part in pair])[:, None].float()
    torch.save({"control_trans": held if words else rows.flatten()}, folder / "pytorch_model.bin")
    write_json(folder / "config.json", preseqlen=P, init_shallow="yes")
    return {"decoder": pairs}


def p_tuning_v2(folder, model, *, projection=False, safe=False):
    """A ``Trainer`` checkpoint of ``...PrefixFor...``: the whole model, the head tuned, and ``prefix_encoder``."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors |= {name: numbers(*tensors[name].shape, seed=9) for name in tensors if name.startswith(("cl", "qa"))}
    wide = width(model, "encoder")
    if projection:
        embedding, layers, rows = mlp("prefix_encoder.", 0, model.config.hidden_size, wide, trans="trans")
        tensors |= {"prefix_encoder.embedding.weight": embedding, **layers}
    else:
        rows = tensors["prefix_encoder.embedding.weight"] = numbers(P, wide)
    write_tensors(folder, tensors, "model.safetensors" if safe else "pytorch_model.bin", safe=safe)
    # What else a Trainer leaves there; none of it is ever read.
    (folder / "training_args.bin").write_bytes(b"\x80\x04not a pickle")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04not a pickle")
    write_json(folder / "config.json", model_type=model.config.model_type, pre_seq_len=P, hidden_dropout_prob=0.1)
    return {"encoder": cut_by_layer(rows, model, "encoder")}


def cartridge(folder, model, *, frozen=1, old=False, lists=False, segments=False, name="cache-step100.pt"):
    """``TrainableCache.save``, of now or (``old``) with ``fixed_`` for ``frozen_``."""
    pairs = cut_by_layer(numbers(P, width(model, "decoder")), model, "decoder")
    hold = list if lists else nn.ParameterList

    def held(half, part):
        parts = [pair[half].float()[None, :, part].contiguous() for pair in pairs]
        return hold(parts if lists else map(nn.Parameter, parts))

    first, rest = slice(0, frozen), slice(frozen, None)
    word = "fixed" if old else "frozen"
    content = {"trainable_keys": held(0, rest), "trainable_values": held(1, rest)}
    content |= {
        f"{word}_{kind}": held(half, first) if frozen else hold() for half, kind in enumerate(["keys", "values"])
    }
    if segments:
        cuts = [(0, frozen, True), (frozen, P, False)] if frozen else [(0, P, False)]
        for half, kind in enumerate(["keys", "values"]):
            content[f"segment_{kind}"] = nn.ParameterList([held(half, slice(*part[:2])) for part in cuts])
        content |= {"segment_info": cuts, "freeze_ranges": [part[:2] for part in cuts if part[2]]}
    torch.save(content, folder / name)
    return {"decoder": pairs}


def write_tensors(folder, tensors, name, *, safe=False):
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    (safetensors.torch.save_file if safe else torch.save)(tensors, folder / name)


def write_json(path, **document):
    path.write_text(json.dumps(document))


def cached_logits(model, pairs, ids, *, shift):
    """The bare model with the prefix in its own cache; real tokens stand at P, or at 0."""
    (every,) = pairs.values()
    dtype = next(model.parameters()).dtype
    batch = [tuple(part.to(dtype).expand(len(ids), -1, -1, -1) for part in pair) for pair in every]
    length = batch[0][0].shape[2]
    mask = torch.ones(len(ids), length + ids.shape[1], dtype=torch.long)
    positions = torch.arange(ids.shape[1])[None] + (length if shift else 0)
    if "padding_idx" in dir(getattr(getattr(model, "roberta", None), "embeddings", None)):
        positions = positions + model.roberta.embeddings.padding_idx + 1
    arguments = {"past_key_values": DynamicCache(batch), "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        if "encoder" not in pairs:
            return model(input_ids=ids, **arguments).logits
        body = getattr(model, model.base_model_prefix)(input_ids=ids, **arguments)
        states = body[0] if body.pooler_output is None else body.pooler_output
        return next(head for name, head in model.named_children() if name in ("classifier", "cls"))(states)


def written_out_logits(model, pairs, source, target, *, shift=False):
    """An encoder-decoder in float64."""
    length = next(iter(pairs.values()))[0][0].shape[1]
    parts = {stack: pairs.get(stack, []) for stack in ("encoder", "decoder", "cross")}
    prefix = reference.Prefix(**parts, length=length, shift=shift)
    rows = zip(source, target, strict=True)
    return torch.stack([reference.LOGITS[model.config.model_type](model, *row, prefix) for row in rows]).float()
