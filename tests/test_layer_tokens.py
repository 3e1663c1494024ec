"""Layers with fewer virtual tokens: they have the last ones, and all else is as it was."""

from __future__ import annotations

import prefixkit_legacy
import pytest
import test_prefixkit_legacy
import tiny
import torch
from test_checkpoint import assert_same, state
from versions import since

import prefixkit
from prefixkit.errors import ConfigError, EngineError
from prefixkit.testing.recording import uncompiled

TOKENS = 5
SHORT = {"num_virtual_tokens": TOKENS, "layer_tokens": {0: 2, 2: 1}}
FAR = -1e5
"""So low a score that a key has no weight."""


def hidden_in_front(model, flat, layer_tokens):
    """The same flat prefix with keys that no query looks at, where a layer has fewer tokens.

    Every query has a last number of one in each head, so a key's last number is a score.
    """
    sites = prefixkit.sites(model)
    pieces = []
    for site, (key, value) in zip(sites, prefixkit.Layout(sites).split(flat), strict=True):
        key = key.clone()
        first = TOKENS - layer_tokens.get(site.layer, TOKENS)
        key[:, :first] = 0
        key[:, :first, -1] = FAR
        pieces.append(prefixkit.KeyValue(key, value))
    return prefixkit.Layout(sites).join(pieces)


def with_ones_in_queries(model):
    """Have the last number of each head's query be one, and that of each real key zero."""
    with torch.no_grad():
        for block in model.transformer.h:
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            for head in range(4):
                for first, number in ((0, 1.0), (32, 0.0)):
                    weight[:, first + head * 8 + 7] = 0
                    bias[first + head * 8 + 7] = number
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", ["shift", "none"])
def test_against_keys_that_nobody_looks_at(positions, attention):
    model, ids = with_ones_in_queries(tiny.make("gpt2", attention=attention)), tiny.tokens(2, 6)
    flat = torch.randn(TOKENS, sum(site.width for site in prefixkit.sites(model)))
    silent = hidden_in_front(model, flat, SHORT["layer_tokens"])
    with torch.no_grad():
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init=silent, positions=positions)
        expected = model(ids).logits
        prefixkit.remove(model)
        prefixkit.apply(model, init=flat, positions=positions, **SHORT)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        prefixkit.remove(model)
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init=flat, positions=positions)
        assert (model(ids).logits - expected).abs().max() > 1e-2


def applied(name, **options):
    torch.manual_seed(0)
    return prefixkit.apply(tiny.make(name), init="tokens", **{**SHORT, **options})


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", pytest.param("t5", marks=since("5.15", "it is off the interface")), "bart"]
)
def test_the_first_tokens_of_a_short_layer_get_no_gradient(name):
    model = applied(name, layer_tokens={0: 2})
    model(**tiny.inputs(model)).logits.square().mean().backward()
    gradient = model.prefixkit.default.embedding.weight.grad
    sites = prefixkit.sites(model)
    for site, pair in zip(sites, prefixkit.Layout(sites).split(gradient), strict=True):
        for part in pair:
            got = part.abs().amax(dim=(0, 2)) > 0
            assert got.tolist() == [False] * 3 + [True] * 2 if site.layer == 0 else bool(got.all())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bart"])
@pytest.mark.parametrize("window", ["pinned", "slide"])
def test_generation_and_padding(name, window):
    model, ids = applied(name, window=window), tiny.tokens(2, 6)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, recomputed = (model.generate(ids, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, recomputed)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if name == "bart":
        return
    with torch.no_grad():
        padded, alone = model(ids, attention_mask=mask).logits[0, 2:], model(ids[:1, 2:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_implementations_agree():
    ids, found = tiny.tokens(2, 6), []
    for attention in ("eager", "sdpa", "flex_attention"):
        model = applied("llama")
        model.set_attn_implementation(attention)
        with torch.no_grad(), uncompiled():
            found.append(model(ids).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not prefixkit_legacy.transformers_is("5.5"), reason="the cache engine alone serves it here")
@pytest.mark.parametrize("positions", ["shift", "none"])
@pytest.mark.parametrize("family", [test_prefixkit_legacy.TestBLOOM, test_prefixkit_legacy.TestGPTJ])
def test_off_the_interface(family, positions):
    model = family().make_model().eval()
    options = {"adapter": family.adapter, "positions": positions, "init": "tokens", "layer_tokens": {0: 2}}
    prefixkit.apply(model, num_virtual_tokens=TOKENS, **options)
    ids = tiny.tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        padded, alone = model(ids, attention_mask=mask).logits[0, 2:], model(ids[:1, 2:]).logits[0]
        torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
        flat = model.prefixkit.default.embedding.weight
        before, width = model(ids).logits, flat.shape[1] // len(prefixkit.sites(model))
        flat[:3, :width] = 7  # the first layer's, which it has not
        assert torch.equal(model(ids).logits, before)
        flat[:3, width:] = 7
        assert not torch.equal(model(ids).logits, before)


def test_saved_and_loaded(tmp_path):
    model, ids = applied("llama"), tiny.tokens(2, 6)
    prefixkit.save(model, tmp_path)
    again = prefixkit.load(tiny.make("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_tokens": {7: 1}}, ConfigError, r"^layer_tokens asks for \[7\], and GPT2LMHeadModel has 0, 1, 2$"),
        ({"layer_tokens": {0: 0}}, ConfigError, r"^layer_tokens has \(0, 0\); it must say of layers"),
        ({"layer_tokens": {0: 6}}, ConfigError, r"^layer_tokens has \(0, 6\)"),
        ({"layer_tokens": {"0": 1}}, ConfigError, r"^layer_tokens has \('0', 1\)"),
        ({"engine": "cache"}, EngineError, "of one length; apply the prefix without layers= and layer_tokens=$"),
    ],
)
def test_what_is_refused(options, error, message):
    model = tiny.make("gpt2")
    before = state(model)
    with pytest.raises(error, match=message):
        prefixkit.apply(model, **{**SHORT, **options})
    assert_same(before, state(model))
