"""The two engines, and the bare model on the native cache, give the same numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
import transformers
from hypothesis import given, strategies as st
from packaging.version import Version
from transformers import EncoderDecoderCache

import prefixkit
from prefixkit.testing.subject import strengthen

TOKENS = 5
METHODS = ("p-tuning-v2", "prefix-tuning")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_bare_encoder_decoder_on_the_native_cache(name, method, attention):
    model = tiny.make(name, attention=attention)
    inputs = tiny.inputs(model, batch=3)
    prefixkit.apply(model, method=method, num_virtual_tokens=TOKENS)
    strengthen(model)
    expected = tiny.logits(model, **inputs)
    with torch.no_grad():
        states = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    cache = prefixkit.to_cache(model, batch_size=3)
    assert type(cache) is EncoderDecoderCache
    prefixkit.remove(model)
    with torch.no_grad():
        found = model.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            encoder_hidden_states=states.last_hidden_state,
            encoder_attention_mask=torch.ones(3, TOKENS + 7, dtype=torch.long),
            past_key_values=cache,
        ).last_hidden_state
        found = model.lm_head(found * (32**-0.5 if name.startswith("t5") else 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert cache.cross_attention_cache.get_seq_length() == TOKENS + 7, "the encoder's states come after the prefix"


@given(st.data())
def test_any_split_of_a_text_gives_the_same_logits(data):
    """Manual decoding in chunks, with the cache that the model returned."""
    name = data.draw(st.sampled_from(("gpt2", "llama")))
    engine = data.draw(st.sampled_from(("attention", "cache")))
    padding = data.draw(st.integers(0, 4))
    length = data.draw(st.integers(2, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)) | {0, length})
    model = tiny.make(name)
    prefixkit.apply(model, num_virtual_tokens=data.draw(st.integers(1, 6)), engine=engine)
    strengthen(model)
    rows = [tiny.tokens(length, seed=1), tiny.tokens(length, seed=2)[padding:]]
    if len(rows[1]) == 0:
        rows = rows[:1]
    ids, mask = tiny.left_pad(rows)
    expected = tiny.logits(model, input_ids=ids, attention_mask=mask)
    cache, parts = None, []
    for start, end in pairwise(cuts):
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
        cache = out.past_key_values
        parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "stacks"), [*((name, None) for name in tiny.EVERY), ("bart", ("decoder",)), ("t5", ("encoder",))]
)
def test_mlp_runs_once_per_forward(name, stacks):
    model = tiny.make(name)
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=TOKENS, stacks=stacks)
    calls = []
    model.prefixkit.default.transform.register_forward_hook(lambda *_: calls.append(1))
    model(**tiny.inputs(model, batch=4))
    # A model that hands no keyword arguments down to its stacks has it computed by each of them.
    old_bart = name == "bart" and Version(transformers.__version__) < Version("5.5")
    assert len(calls) == (2 if old_bart and stacks is None else 1)


def test_no_cache_is_returned_that_was_not_asked_for():
    model = tiny.make("llama")
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine="cache")
    assert model(**tiny.inputs(model), use_cache=False).past_key_values is None
    outputs = model(**tiny.inputs(model), use_cache=False, return_dict=False)
    assert all(isinstance(output, torch.Tensor) for output in outputs)
    assert model(**tiny.inputs(model), use_cache=True).past_key_values.get_seq_length() == TOKENS + 7
