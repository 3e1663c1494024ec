"""``generate`` equals step-by-step recomputation without a cache, for every engine and padding."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import prefixkit

TOKENS = 5
NEW = 8
CASES = [(name, engine) for name in ("gpt2", "llama", "t5-deep-encoder", "bart") for engine in ("attention", "cache")]


def with_prefix(name, engine, positions="shift", **changes):
    model = tiny.make(name, **changes)
    stacks = ("decoder", "cross") if engine == "cache" and model.config.is_encoder_decoder else None
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine, stacks=stacks, positions=positions)
    with torch.no_grad():
        model.prefixkit.default.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def recompute(model, ids, mask=None):
    """Greedy search by whole forwards, each without a cache."""
    start = ids if not model.config.is_encoder_decoder else None
    out = torch.full((len(ids), 1), model.generation_config.decoder_start_token_id or 0) if start is None else start
    for _ in range(NEW):
        if model.config.is_encoder_decoder:
            arguments = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": out}
        else:
            longer = (
                None if mask is None else torch.cat([mask, mask.new_ones(len(ids), out.shape[1] - ids.shape[1])], 1)
            )
            arguments = {"input_ids": out, "attention_mask": longer}
        scores = tiny.logits(model, **arguments, use_cache=False)[:, -1]
        out = torch.cat([out, scores.argmax(-1, keepdim=True)], dim=1)
    return out


def generate(model, ids, mask, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **settings}
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_greedy(name, engine):
    model = with_prefix(name, engine)
    ids = tiny.tokens(3, 6)
    mask = torch.ones_like(ids)
    assert torch.equal(generate(model, ids, mask), recompute(model, ids))


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_greedy_left_padded_equals_rows_alone(name, engine):
    model = with_prefix(name, engine)
    rows = [tiny.tokens(length, seed=length) for length in (2, 6, 4)]
    ids, mask = tiny.left_pad(rows)
    found = generate(model, ids, mask)
    assert torch.equal(found, recompute(model, ids, mask))
    for row, text in enumerate(rows):
        alone = generate(model, text[None], torch.ones(1, len(text), dtype=torch.long))
        assert torch.equal(found[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("positions", ["shift", "none"])
@pytest.mark.parametrize(("name", "engine"), CASES)
def test_beam(name, engine, positions):
    """Same sequences without a cache, and scores that whole forwards confirm."""
    if (name, engine, positions) == ("t5-deep-encoder", "cache", "none"):
        with pytest.raises(prefixkit.EngineError, match="no relative-position bias"):
            with_prefix(name, engine, positions)
        return
    model = with_prefix(name, engine, positions)
    ids, mask = tiny.left_pad([tiny.tokens(length, seed=length) for length in (3, 6)])
    settings = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    found = generate(model, ids, mask, **settings)
    if engine == "attention":
        assert torch.equal(found.sequences, generate(model, ids, mask, use_cache=False, **settings).sequences)
    if model.config.is_encoder_decoder:
        arguments = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": found.sequences}
    else:
        arguments = {"input_ids": found.sequences, "attention_mask": torch.cat([mask, mask.new_ones(2, NEW)], dim=1)}
    chances = tiny.logits(model, **arguments).log_softmax(-1)[:, -NEW - 1 : -1]
    totals = chances.gather(-1, found.sequences[:, -NEW:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, totals, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_static_cache(name):
    model = with_prefix(name, "attention")
    ids, mask = tiny.left_pad([tiny.tokens(length, seed=length) for length in (3, 6)])
    cache = StaticCache(config=model.config, max_cache_len=6 + NEW)
    found = generate(model, ids, mask, past_key_values=cache, disable_compile=True)
    assert torch.equal(found, recompute(model, ids, mask))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_prompt_lookup_and_no_cache(name):
    model = with_prefix(name, "attention")
    ids = tiny.tokens(1, 6)
    mask = torch.ones_like(ids)
    expected = recompute(model, ids)
    assert torch.equal(generate(model, ids, mask, use_cache=False), expected)
    if name != "bart":
        assert torch.equal(generate(model, ids, mask, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_turns_with_the_returned_cache(name):
    model = with_prefix(name, "attention")
    first = tiny.tokens(1, 6)
    out = generate(model, first, torch.ones_like(first), return_dict_in_generate=True)
    second = torch.cat([out.sequences, tiny.tokens(1, 3, seed=9)], dim=1)
    mask = torch.ones_like(second)
    assert torch.equal(generate(model, second, mask, past_key_values=out.past_key_values), recompute(model, second))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_turns_are_refused_by_the_cache_engine(name):
    model = with_prefix(name, "cache")
    first = tiny.tokens(1, 6)
    out = generate(model, first, torch.ones_like(first), return_dict_in_generate=True)
    second = torch.cat([out.sequences, tiny.tokens(1, 9, seed=9)], dim=1)
    with pytest.raises(prefixkit.EngineError, match="generate"):
        generate(model, second, torch.ones_like(second), past_key_values=out.past_key_values)


def test_decoder_deeper_than_encoder():
    """transformers sizes T5's caches by the encoder; with a cache that grows, generation works."""
    model = with_prefix("t5", "attention")
    ids = tiny.tokens(2, 6)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert torch.equal(generate(model, ids, torch.ones_like(ids), past_key_values=cache), recompute(model, ids))


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_positions_past_the_table_are_refused(engine):
    model = with_prefix("gpt2", engine, n_positions=10)
    assert tiny.logits(model, input_ids=tiny.tokens(1, 5)).shape[1] == 5
    message = (
        "^position 10 is past the model's 10 positions, of which the prefix takes 5; "
        "shorten the input or the prefix, or pass positions='none'$"
    )
    with pytest.raises(prefixkit.EngineError, match=message):
        model(input_ids=tiny.tokens(1, 6))
    ids, mask = tiny.left_pad([tiny.tokens(5), tiny.tokens(3)])
    wider = torch.cat([torch.full((2, 4), tiny.PAD), ids], dim=1)
    tiny.logits(model, input_ids=wider, attention_mask=torch.cat([torch.zeros(2, 4, dtype=torch.long), mask], dim=1))


def test_continuous_batching_is_refused():
    """transformers would answer with empty lists, or with the base."""
    model = with_prefix("llama", "attention")
    with pytest.raises(prefixkit.EngineError, match="^continuous batching does not serve a prefix; use generate"):
        model.generate_batch(inputs=[[5, 6, 7]])
    prefixkit.remove(model)
    assert model.generate_batch.__func__ is type(model).generate_batch
