"""A prefix read off real text gives the logits of prompting with that text.

The oracle is the bare base on prompt and text together; the prefix is read from the base's own
cache, so neither engine has a hand in it.
"""

from __future__ import annotations

import tiny
import torch
from hypothesis import given, strategies as st
from transformers import DynamicCache

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
