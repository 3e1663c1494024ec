"""Continuous batching of transformers against ``generate`` of each prompt alone."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from transformers import GenerationConfig

import prefixkit
from prefixkit import transformers_internals as internals
from prefixkit.testing.subject import strengthen

pytestmark = pytest.mark.filterwarnings("default")
serves = pytest.mark.skipif(
    not internals.has_paged_attention(), reason="sdpa of this transformers reads no paged cache"
)
TOKENS, NEW = 5, 6
PROMPTS = [tiny.tokens(length, seed=length).tolist() for length in (3, 6, 19)]
"""The last is longer than a page, and than what is read at once."""


def with_prefix(name="llama", **options):
    model = tiny.make(name)
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, **options})
    strengthen(model)
    return model


def settings():
    """Few and small pages: left alone, transformers takes nine tenths of the memory."""
    sizes = {"num_blocks": 32, "max_batch_tokens": 16, "page_size": 8}
    return transformers.ContinuousBatchingConfig(**sizes)


def alone(model, prompts=PROMPTS):
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in prompts]


def batched(model, prompts=PROMPTS, **options):
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    found = model.generate_batch(prompts, greedy, continuous_batching_config=settings(), **options)
    assert [one.error for one in found.values()] == [None] * len(prompts)
    return [one.generated_tokens for one in found.values()]


@serves
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"positions": "none"}),
        ("llama", {"method": "prefix-tuning"}),
        ("llama", {"gate": True, "positions": "none"}),
        ("llama", {"layers": [0, 2]}),
        ("gpt2", {}),
        ("qwen3", {}),
        ("gemma3", {"window": "pinned"}),
        ("gemma3", {"window": "slide"}),
        ("mistral", {"window": "pinned"}),
    ],
    ids=str,
)
def test_as_each_prompt_alone(name, options):
    model = with_prefix(name, **options)
    expected = alone(model)
    assert batched(model) == expected
    with prefixkit.disabled(model):
        bare = alone(model)
        assert batched(model) == bare != expected
    prefixkit.remove(model)
    assert batched(model) == bare
    assert model.generate_batch.__func__ is type(model).generate_batch


@serves
def test_each_prefix_by_its_name():
    model = with_prefix(name="llama")
    prefixkit.apply(model, name="other", num_virtual_tokens=3)
    strengthen(model)
    expected = alone(model)
    assert batched(model) == expected
    prefixkit.activate(model, "default")
    assert batched(model) == alone(model) != expected


@serves
def test_a_prefix_that_changes_while_it_runs():
    """Pages of the text are shared between requests, and were read with the first prefix."""
    model = with_prefix()
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=settings()) as manager:
        name = manager.add_request(PROMPTS[2], max_new_tokens=NEW)
        first = manager.get_result(name, timeout=60)
        assert first.generated_tokens == alone(model, PROMPTS[2:])[0]
        with torch.no_grad():
            model.prefixkit.default.embedding.weight.mul_(2)
        again = manager.get_result(manager.add_request(PROMPTS[2], max_new_tokens=NEW), timeout=60)
        assert "the prefix was changed, switched on or switched off" in again.error
        assert not again.generated_tokens


@serves
def test_what_goes_round_the_check_is_not_lost_either(caplog):
    """The class's own method, with an attention that takes no prefix."""
    model = with_prefix()
    model.set_attn_implementation("eager")
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    config = settings()
    manager = transformers.ContinuousBatchingManager(model, greedy, config)
    manager.start()
    try:
        found = manager.get_result(manager.add_request(PROMPTS[0], max_new_tokens=NEW), timeout=60)
    finally:
        manager.stop(block=True)
    assert "the attention engine cannot wrap the attention implementation 'paged|eager'" in found.error
    assert not found.generated_tokens


INSTEAD = r"; use generate\(\), or prefixkit.remove\(model\) first$"


@serves
@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("llama", {"engine": "cache"}, "a prefix of the cache engine"),
        ("llama", {"infix": True}, "an infix"),
        ("t5", {"stacks": ["decoder"], "engine": "cache"}, "a prefix of the cache engine"),
        ("bart", {}, "a prefix of this architecture"),
    ],
)
def test_refusals(name, options, what):
    model = prefixkit.apply(tiny.make(name), num_virtual_tokens=TOKENS, **options)
    with pytest.raises(prefixkit.EngineError, match=f"^continuous batching does not serve {what}{INSTEAD}"):
        model.generate_batch(PROMPTS)


@serves
def test_other_attention_is_refused():
    model = with_prefix()
    model.set_attn_implementation("eager")
    with pytest.raises(prefixkit.EngineError, match="does not serve a prefix with 'eager' attention, only with sdpa"):
        model.generate_batch(PROMPTS)


@serves
def test_a_prefix_for_each_row_is_refused():
    model = with_prefix()
    message = rf"^continuous batching does not serve a prefix for each row \(prefixkit.rows\){INSTEAD}"
    with prefixkit.rows(model, ["default"]), pytest.raises(prefixkit.EngineError, match=message):
        model.generate_batch(PROMPTS)


@serves
def test_a_manager_that_stays_is_refused():
    model = with_prefix()
    with pytest.raises(prefixkit.EngineError, match="^a persistent manager of continuous batching keeps text"):
        model.generate_batch(PROMPTS, persistent_manager=True)
    prefixkit.remove(model)
    batched(model, persistent_manager=True)
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with pytest.raises(prefixkit.EngineError, match="^a persistent manager of continuous batching keeps text"):
        batched(model)
    model.destroy_cached_continuous_batching_manager()
    batched(model)


@pytest.mark.skipif(internals.has_paged_attention(), reason="from then on a prefix is served")
def test_older_versions_refuse():
    model = with_prefix()
    message = f"^continuous batching does not serve a prefix in this version of transformers{INSTEAD}"
    with pytest.raises(prefixkit.EngineError, match=message):
        model.generate_batch(PROMPTS)
