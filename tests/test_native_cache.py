"""The kinds of cache that to_cache makes, on the bare model.

The oracles: the bare model on prompt and text together, and the attention engine.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import rotary
import tiny
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from versions import since, within

import prefixkit
from prefixkit.errors import ConfigError, EngineError
from prefixkit.testing.subject import strengthen

PLACES = 24
KINDS = {"dynamic": {}, "static": {"max_cache_len": PLACES}, "tuple": {}}
STACKS = (("decoder", "cross"), ("decoder",), ("cross",))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
appending = since("5.5", "a decoder writes over what stands in a static cross cache")


def native(model, batch, kind):
    """A cache of any kind, a tuple put into the cache of today's models."""
    cache = prefixkit.to_cache(model, batch, kind=kind, **KINDS[kind])
    if kind != "tuple":
        assert type(cache) is {"dynamic": DynamicCache, "static": StaticCache}[kind]
        return cache
    made = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(cache):
        made.update(key, value, layer)
    return made


def in_chunks(model, ids, cache, cuts):
    """Logits of the bare model that reads ``ids`` bit by bit."""
    parts = [
        tiny.logits(model, input_ids=ids[:, a:b], past_key_values=cache) for a, b in pairwise([0, *cuts, ids.shape[1]])
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 4, 7])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-mqa", "mistral", "gemma3", "gpt-oss"])
def test_a_prompt_in_a_cache(name, tokens, kind):
    """Windows are of 4 tokens: the prompt fits, fills them, or has slid out in part."""
    model = tiny.make(name, attention="eager")
    prompt, ids = tiny.tokens(1, tokens, seed=5), tiny.tokens(2, 9)
    expected = tiny.logits(model, input_ids=torch.cat([prompt.expand(2, -1), ids], dim=1))[:, tokens:]
    prefixkit.apply(model, num_virtual_tokens=tokens, window="slide", init=prefixkit.TextInit(prompt))
    for cuts in ([], [3, 4, 8]):
        cache = native(model, 2, kind)
        with prefixkit.disabled(model):
            found = in_chunks(model, ids, cache, cuts)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_generate(name, beams, kind):
    model = tiny.make(name)
    prefixkit.apply(model, num_virtual_tokens=5, window="slide")
    strengthen(model)
    ids, settings = tiny.tokens(2, 6), {**GREEDY, "num_beams": beams}
    expected = model.generate(ids, **settings)
    cache = native(model, 2 * beams, kind)
    prefixkit.remove(model)
    # generate() takes what the cache holds for tokens that were read.
    read = torch.cat([torch.full((2, 5), 3), ids], dim=1)
    assert torch.equal(model.generate(read, past_key_values=cache, **settings)[:, 5:], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", rotary.MAKERS)
def test_keys_are_turned_for_a_model_that_counts(name, kind):
    """positions="none": the text stands at 0 with prefixkit, and at P behind a cache."""
    model = rotary.make(name)
    prefixkit.apply(model, num_virtual_tokens=5, window="slide", positions="none")
    strengthen(model)
    ids = tiny.tokens(2, 6)
    expected = tiny.logits(model, input_ids=ids)
    cache = native(model, 2, kind)
    prefixkit.remove(model)
    torch.testing.assert_close(in_chunks(model, ids, cache, [4]), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("positions", ["shift", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, positions):
    """No further from the same model in float32 than the attention engine is."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.make("llama").to(dtype)
        prefixkit.apply(model, num_virtual_tokens=5, positions=positions, init=torch.ones(5, 96))
        strengthen(model)
        results.append(tiny.logits(model, input_ids=tiny.tokens(2, 6)).float())
    cache = native(model, 2, kind)
    prefixkit.remove(model)
    found = in_chunks(model, tiny.tokens(2, 6), cache, []).float()
    fine, engine = results
    assert (found - fine).abs().max() < 2 * (engine - fine).abs().max()


@pytest.mark.parametrize(
    ("kind", "stacks"),
    [
        *(("dynamic", stacks) for stacks in STACKS),
        *(pytest.param("static", stacks, marks=appending) for stacks in STACKS),
        *(("tuple", stacks) for stacks in STACKS[:2]),  # pairs of cross-attention alone are tested below
    ],
)
@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_encoder_decoder(name, kind, stacks):
    model = tiny.make(name)
    inputs = tiny.inputs(model)
    prefixkit.apply(model, num_virtual_tokens=5, stacks=stacks, engine="cache")
    strengthen(model)
    expected = tiny.logits(model, **inputs)
    lengths = {"max_cache_len": PLACES, "source_len": 7} if kind == "static" else {}
    cache = prefixkit.to_cache(model, 2, kind=kind, **lengths)
    if kind == "tuple":
        made = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, parts in enumerate(cache):
            made.self_attention_cache.update(*parts[:2], layer)
            if "cross" in stacks:
                made.cross_attention_cache.update(*parts[2:], layer)
        cache = made
    kinds = {type(part) for part in (cache.self_attention_cache, cache.cross_attention_cache)}
    assert kinds == {StaticCache if kind == "static" else DynamicCache}
    prefixkit.remove(model)
    with torch.no_grad():
        states = model.get_encoder()(input_ids=inputs["input_ids"])
    mask = torch.ones(2, 7 + 5 * ("cross" in stacks), dtype=torch.long)
    again = {"encoder_outputs": states, "attention_mask": mask, "past_key_values": cache}
    parts = [
        tiny.logits(model, decoder_input_ids=part, **again) for part in inputs["decoder_input_ids"].split([3, 1, 1], 1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


def test_pairs_of_cross_attention_alone():
    model = tiny.make("bart")
    prefixkit.apply(model, num_virtual_tokens=5, stacks=("cross",))
    tuples = prefixkit.to_cache(model, 2, kind="tuple")
    with torch.no_grad():
        pieces = prefixkit.Layout(prefixkit.sites(model)).split(model.prefixkit.default())
    assert [len(layer) for layer in tuples] == [2, 2, 2]
    for layer, piece in zip(tuples, pieces, strict=True):
        assert all(torch.equal(rows[row], part) for rows, part in zip(layer, piece, strict=True) for row in (0, 1))


def test_rows_of_a_cache_are_their_own():
    """What one row, or one cache, writes is not seen in another."""
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=5)
    tuples = prefixkit.to_cache(model, 2, kind="tuple")
    tuples[0][0][0].zero_()
    assert tuples[0][0][1].abs().sum() > 0
    assert prefixkit.to_cache(model, 1, kind="tuple")[0][0].abs().sum() > 0


def test_lengths_and_kinds_that_cannot_be():
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=5)
    cases = [
        ({"kind": "statik"}, "kind is 'statik' (did you mean 'static'?); possible: dynamic, static, tuple"),
        (
            {"kind": "static"},
            "max_cache_len is None; a static cache needs room for the 5 virtual tokens and the longest text "
            "together, 6 or more",
        ),
        (
            {"kind": "static", "max_cache_len": 5},
            "max_cache_len is 5; a static cache needs room for the 5 virtual tokens and the longest text together, "
            "6 or more",
        ),
        (
            {"max_cache_len": 9},
            "max_cache_len and source_len are for kind='static'; a dynamic cache grows with the text",
        ),
        (
            {"kind": "static", "max_cache_len": 9, "source_len": 4},
            "source_len is 4, but this model has no cross-attention; leave it out",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError) as caught:
            prefixkit.to_cache(model, **arguments)
        assert str(caught.value) == message


def test_a_static_cross_cache_needs_its_length():
    model = prefixkit.apply(tiny.make("bart"), num_virtual_tokens=5, stacks=("decoder", "cross"))
    with pytest.raises(ConfigError, match="^source_len is None; a static cache for cross-attention needs to know how"):
        prefixkit.to_cache(model, kind="static", max_cache_len=9)


@pytest.mark.skipif(not within("4", "5.5"), reason="from transformers 5.5 on a decoder appends")
def test_a_static_cross_cache_before_it_appended():
    model = prefixkit.apply(tiny.make("bart"), num_virtual_tokens=5, stacks=("decoder", "cross"))
    with pytest.raises(EngineError, match="a decoder writes its encoder's states over what stands in a static cache"):
        prefixkit.to_cache(model, kind="static", max_cache_len=9, source_len=4)


@pytest.mark.skipif(not within("4", "5.5"), reason="from transformers 5.5 on a static cache counts by itself")
def test_a_static_cache_that_counts_keys_which_are_not_zero():
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=5, init="zeros")
    with pytest.raises(EngineError, match="counts 0 tokens in a static cache of 5, since it takes keys of zeros for"):
        prefixkit.to_cache(model, kind="static", max_cache_len=9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_cache_can_say(kind):
    cases = [
        (tiny.make("gpt2"), {"positions": "none"}, "a bare model counts positions .* in one: this model's keys cannot"),
        (tiny.make("mistral"), {}, "a native cache cannot keep a prefix in sight of a sliding window"),
        (tiny.make("llama"), {"layers": [0, 2]}, "a native cache needs a prefix in every layer, of one length"),
        (tiny.make("llama"), {"gate": True, "positions": "none"}, "a native cache holds keys and values only"),
    ]
    for model, options, message in cases:
        prefixkit.apply(model, num_virtual_tokens=4, **options)
        with pytest.raises(EngineError, match=f"^{message}"):
            prefixkit.to_cache(model, kind=kind, **KINDS[kind])
