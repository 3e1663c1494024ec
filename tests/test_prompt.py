"""A prefix read off real text gives the logits of prompting with that text.

The oracle is the bare base on prompt and text together; the prefix is read from the base's own
cache, so neither engine has a hand in it.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache

import prefixkit
from prefixkit import KeyValue, Layout

PROMPT = 6


def flat_of_prompt(model, prompt, stacks=None):
    """The base's own keys and values of ``prompt`` as a flat prefix."""
    with torch.no_grad():
        cache = model(input_ids=prompt[None], past_key_values=DynamicCache()).past_key_values
    sites = [site for site in prefixkit.sites(model) if stacks is None or site.stack in stacks]
    pieces = [KeyValue(cache.layers[site.layer].keys[0], cache.layers[site.layer].values[0]) for site in sites]
    return Layout(sites).join(pieces)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("engine", ["attention", "cache"])
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders(name, engine, attention):
    model = tiny.make(name, attention=attention)
    prompt, text = tiny.tokens(PROMPT, seed=5), tiny.tokens(3, 9)
    expected = tiny.logits(model, input_ids=torch.cat([prompt.expand(3, -1), text], dim=1))[:, PROMPT:]
    flat = flat_of_prompt(model, prompt)
    prefixkit.apply(model, num_virtual_tokens=PROMPT, init=flat, engine=engine)
    torch.testing.assert_close(tiny.logits(model, input_ids=text), expected, atol=1e-5, rtol=0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), st.sampled_from(tiny.DECODERS))
def test_left_padded_rows(lengths, prompt_length, name):
    """Each row of a padded batch is the base on prompt and row alone."""
    model = tiny.make(name)
    prompt = tiny.tokens(prompt_length, seed=5)
    rows = [tiny.tokens(length, seed=length) for length in lengths]
    expected = [tiny.logits(model, input_ids=torch.cat([prompt, row])[None])[0, prompt_length:] for row in rows]
    flat = flat_of_prompt(model, prompt)
    ids, mask = tiny.left_pad(rows)
    for engine in ("attention", "cache"):
        prefixkit.apply(model, num_virtual_tokens=prompt_length, init=flat, engine=engine)
        found = tiny.logits(model, input_ids=ids, attention_mask=mask)
        for row, wanted in enumerate(expected):
            torch.testing.assert_close(found[row, -len(wanted) :], wanted, atol=1e-5, rtol=0)
        prefixkit.remove(model)


@pytest.mark.parametrize("engine", ["attention", "cache"])
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_generation_goes_on_from_the_prompt(name, engine):
    model = tiny.make(name)
    prompt, text = tiny.tokens(PROMPT, seed=5), tiny.tokens(1, 4)
    both = torch.cat([prompt[None], text], dim=1)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(both, attention_mask=torch.ones_like(both), **settings)[:, PROMPT:]
    prefixkit.apply(model, num_virtual_tokens=PROMPT, init=flat_of_prompt(model, prompt), engine=engine)
    assert torch.equal(model.generate(text, attention_mask=torch.ones_like(text), **settings), expected)


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_decoder_prefix_of_an_encoder_decoder(name):
    """The decoder's own prefix alone is a prompt of the decoder."""
    model = tiny.make(name)
    inputs = tiny.inputs(model, batch=1)
    prompt, target = tiny.tokens(PROMPT, seed=5), inputs.pop("decoder_input_ids")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        model(**inputs, decoder_input_ids=prompt[None], past_key_values=cache, use_cache=True)
    both = torch.cat([prompt[None], target], dim=1)
    expected = tiny.logits(model, **inputs, decoder_input_ids=both)[:, PROMPT:]
    sites = [site for site in prefixkit.sites(model) if site.stack == "decoder"]
    layers = cache.self_attention_cache.layers
    flat = Layout(sites).join([KeyValue(layers[site.layer].keys[0], layers[site.layer].values[0]) for site in sites])
    for engine in ("attention", "cache"):
        prefixkit.apply(model, num_virtual_tokens=PROMPT, init=flat, stacks=("decoder",), engine=engine)
        found = tiny.logits(model, **inputs, decoder_input_ids=target)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        prefixkit.remove(model)
