"""Encoder-decoder prefixes against a reference in float64, and that reference against the base."""

from __future__ import annotations

import pytest
import reference
import tiny
import torch

import prefixkit

CLOSE = 3e-6
"""Of float64; T5 normalises and takes its softmax in float32."""
TOKENS = 4


def shapes(model, stack):
    config = model.config
    if config.model_type == "t5":
        layers = config.num_layers if stack == "encoder" else config.num_decoder_layers
        return [(config.num_heads, config.d_kv)] * layers
    heads = config.encoder_attention_heads if stack == "encoder" else config.decoder_attention_heads
    layers = config.encoder_layers if stack == "encoder" else config.decoder_layers
    return [(heads, config.d_model // heads)] * layers


def cut(model, flat, stacks, shift):
    """The reference's own reading of the flat prefix: encoder, decoder, cross sites in that order."""
    order = [name for name in ("encoder", "decoder", "cross") if name in stacks]
    pairs = reference.cut(flat, [shape for name in order for shape in shapes(model, name)])
    parts = {}
    for name in order:
        count = len(shapes(model, name))
        parts[name], pairs = pairs[:count], pairs[count:]
    empty = {name: [] for name in ("encoder", "decoder", "cross")}
    return reference.Prefix(**{**empty, **parts}, length=len(flat), shift=shift)


def width(model, stacks):
    return sum(2 * heads * dim for name in stacks for heads, dim in shapes(model, name))


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_the_reference_is_the_base_without_a_prefix(name):
    model = tiny.make(name).double()
    inputs = tiny.inputs(model, batch=1)
    none = reference.Prefix([], [], [], 0, True)
    expected = reference.LOGITS[name](model, inputs["input_ids"][0], inputs["decoder_input_ids"][0], none)
    torch.testing.assert_close(tiny.logits(model, **inputs)[0], expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["shift", "none"])
@pytest.mark.parametrize("stacks", [None, ("encoder",), ("decoder",), ("cross",), ("decoder", "cross")])
@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_attention_engine(name, stacks, positions, attention):
    model = tiny.make(name, attention=attention).double()
    chosen = stacks or ("encoder", "decoder", "cross")
    flat = tiny.random_flat(width(model, chosen), TOKENS)
    prefix = cut(model, flat, chosen, positions == "shift")
    inputs = tiny.inputs(model, batch=2)
    expected = [
        reference.LOGITS[name](model, source, target, prefix)
        for source, target in zip(inputs["input_ids"], inputs["decoder_input_ids"], strict=True)
    ]
    prefixkit.apply(model, num_virtual_tokens=TOKENS, stacks=stacks, positions=positions, init=flat)
    torch.testing.assert_close(tiny.logits(model, **inputs), torch.stack(expected), atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    ("name", "positions"), [("t5", "shift"), ("t5-deep-encoder", "shift"), ("bart", "shift"), ("bart", "none")]
)
def test_cache_engine(name, positions):
    model = tiny.make(name).double()
    stacks = ("decoder", "cross")
    flat = tiny.random_flat(width(model, stacks), TOKENS)
    prefix = cut(model, flat, stacks, positions == "shift")
    inputs = tiny.inputs(model, batch=1)
    expected = reference.LOGITS[name](model, inputs["input_ids"][0], inputs["decoder_input_ids"][0], prefix)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, stacks=stacks, positions=positions, init=flat, engine="cache")
    torch.testing.assert_close(tiny.logits(model, **inputs)[0], expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["shift", "none"])
@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_padded_on_either_side(name, positions, attention):
    """Source and target padded left or right: every row is the unpadded reference."""
    model = tiny.make(name, attention=attention).double()
    chosen = ("encoder", "decoder", "cross")
    flat = tiny.random_flat(width(model, chosen), TOKENS)
    prefix = cut(model, flat, chosen, positions == "shift")
    sources = [tiny.tokens(length, seed=length) for length in (3, 8, 5)]
    targets = [tiny.tokens(length, seed=length) for length in (6, 2, 4)]
    expected = [reference.LOGITS[name](model, *pair, prefix) for pair in zip(sources, targets, strict=True)]
    prefixkit.apply(model, num_virtual_tokens=TOKENS, positions=positions, init=flat)
    for flip_source in (False, True):
        for flip_target in (False, True):
            ids, mask = pad(sources, flip_source)
            decoder_ids, decoder_mask = pad(targets, flip_target)
            found = tiny.logits(
                model,
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=decoder_ids,
                decoder_attention_mask=decoder_mask,
            )
            for row in range(3):
                real = found[row][decoder_mask[row].bool()]
                torch.testing.assert_close(real, expected[row], atol=CLOSE, rtol=0)


def pad(rows, right):
    if not right:
        return tiny.left_pad(rows)
    ids, mask = tiny.left_pad([row.flip(0) for row in rows])
    return ids.flip(1), mask.flip(1)
