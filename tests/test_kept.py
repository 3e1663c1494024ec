"""What the steps of a generation share: made once, never stale, and the numbers of steps that share nothing."""

from __future__ import annotations

import copy
import gc

import pytest
import tiny
import torch
from transformers import DynamicCache

import prefixkit
from prefixkit import kept

STEPS = 5
METHODS = {"prefix-tuning": {"method": "prefix-tuning"}, "prompt-tuning": {"method": "prompt-tuning"}, "flat": {}}


def count_calls(module):
    """A list that grows by one at each call."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def prefixed(name="llama", **options):
    """A model whose prefix is as strong as its own keys and values."""
    model = tiny.make(name)
    prefixkit.apply(model, **{"num_virtual_tokens": 4, "init": "random", **options})
    stir(model)
    return model.eval()


def stir(model, seed=1):
    """Other numbers for the prefix, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.prefixkit.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))


def step(model, tokens, cache, **options):
    """Logits of the last token."""
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, **options).logits[:, -1].detach()


def in_steps(model, tokens, between=lambda _: None, cache=None):
    """Logits after each token, with ``between`` called before the last."""
    cache = DynamicCache() if cache is None else cache
    found = [step(model, tokens[:, :1], cache), step(model, tokens[:, 1:2], cache)]
    between(model)
    return torch.stack([*found, step(model, tokens[:, 2:3], cache)])


def tokens_of(rows=2, length=3):
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning"])
def test_a_generation_asks_the_encoder_once(name, method):
    model = prefixed(name, **METHODS[method])
    calls, stacks = count_calls(model.prefixkit.default), count_calls(model.get_decoder())
    for times in (1, 2):
        model.generate(tokens_of(), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        assert len(calls) == times
        assert len(stacks) == times * (STEPS + (method == "prompt-tuning"))


@pytest.mark.parametrize("name", ["t5-deep-encoder", "bart"])
def test_of_two_stacks_each_asks_once(name):
    model = prefixed(name, method="prefix-tuning")
    calls = count_calls(model.prefixkit.default)
    model.generate(tokens_of(), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    assert len(calls) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_steps_give_what_one_call_gives(method, engine):
    if (method, engine) == ("prompt-tuning", "cache"):
        pytest.skip("the cache engine reads no embeddings")
    model, tokens = prefixed(engine=engine, **METHODS[method]), tokens_of()
    whole = model(input_ids=tokens).logits.detach()  # with gradients: nothing is kept
    with torch.no_grad():
        torch.testing.assert_close(in_steps(model, tokens), whole.transpose(0, 1))


def test_casts_are_made_once_and_are_those_of_every_step(monkeypatch):
    model = prefixed()
    model.to(torch.bfloat16).prefixkit.float()
    tokens, casts = tokens_of(), []
    expected = in_steps(model, tokens)
    real = kept.once

    def noting(where, name, make):
        return real(where, name, lambda: casts.append(name) or make())

    monkeypatch.setattr("prefixkit.prefix_state.once", noting)
    with torch.no_grad():
        assert torch.equal(in_steps(model, tokens), expected)
    assert len(casts) == model.config.num_hidden_layers


def written_in_place(model):
    stir(model, seed=2)


def put_in_place(model):
    for value in model.prefixkit.parameters():
        value.data = torch.ones_like(value)


def loaded_in_place(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items() if "prefixkit" in name}, False)


def with_other_parameters(model):
    for module in model.prefixkit.modules():
        for name, value in list(module._parameters.items()):
            module._parameters[name] = torch.nn.Parameter(torch.ones_like(value))


def trained_by_a_step(model):
    optimizer = torch.optim.AdamW(model.prefixkit.parameters(), lr=1.0)
    with torch.enable_grad():
        model(input_ids=tokens_of(), labels=tokens_of()).loss.backward()
    optimizer.step()


def with_another_active(model):
    prefixkit.apply(model, num_virtual_tokens=2, name="other", init="random")
    stir(model, seed=3)
    model.eval()


CHANGES = [
    written_in_place,
    put_in_place,
    loaded_in_place,
    with_other_parameters,
    trained_by_a_step,
    with_another_active,
]


@pytest.mark.parametrize("method", ["prefix-tuning", "flat"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_prefix_that_changes_between_two_steps_is_not_the_old_one(change, method):
    """The same with gradients on, where nothing is kept, says what comes out."""
    tokens = tokens_of()
    expected = in_steps(prefixed(**METHODS[method]), tokens, change)
    same = in_steps(prefixed(**METHODS[method]), tokens)
    assert not torch.allclose(expected[-1], same[-1], atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(in_steps(prefixed(**METHODS[method]), tokens, change), expected)


@pytest.mark.parametrize("start", ["a new cache", "a cache that is reset", "a cache that is cropped"])
def test_a_text_begins_with_the_prefix_as_it_is(start):
    """Even after a write that no version tells."""
    model, tokens, cache = prefixed(method="prefix-tuning"), tokens_of(), DynamicCache()
    with torch.no_grad():
        before = in_steps(model, tokens, cache=cache)
        for value in model.prefixkit.parameters():
            value.data.mul_(-0.5)
        if start == "a cache that is reset":
            cache.reset()
        elif start == "a cache that is cropped":
            cache.crop(-3)
        else:
            cache = DynamicCache()
        assert cache.get_seq_length() == 0
        after = in_steps(model, tokens, cache=cache)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, model(input_ids=tokens).logits.detach().transpose(0, 1))


def test_a_copy_of_the_model_does_not_get_the_prefix_of_the_first():
    model, tokens, cache = prefixed(method="prefix-tuning"), tokens_of(), DynamicCache()
    other = copy.deepcopy(model)
    stir(other, seed=5)
    with torch.no_grad():
        step(model, tokens[:, :2], cache)
        copied = copy.deepcopy(cache)
        found = step(other, tokens[:, 2:], cache)
    torch.testing.assert_close(found, step(other, tokens[:, 2:], copied))


def test_rows_share_their_mixture_and_no_other(monkeypatch):
    model = prefixed()
    prefixkit.apply(model, num_virtual_tokens=2, name="other", init="random")
    stir(model)
    tokens, made = tokens_of(), []
    for rows in (["default", "other"], ["other", None]):
        with prefixkit.rows(model, rows):
            expected = in_steps(model.eval(), tokens)
            real = type(prefixkit.prefixes.require(model).rows).mixture
            monkeypatch.setattr(
                "prefixkit.mixture.Rows.mixture",
                lambda *args: made.append(1) or real(*args),  # noqa: B023
            )
            with torch.no_grad():
                torch.testing.assert_close(in_steps(model, tokens), expected)
            monkeypatch.undo()
    assert len(made) == 2


def test_what_autocast_made_is_not_for_steps_without_it():
    model, tokens, cache = prefixed(method="prefix-tuning"), tokens_of(), DynamicCache()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            step(model, tokens[:, :2], cache)
        copied = copy.deepcopy(cache)
        found = step(model, tokens[:, 2:], cache)
    assert torch.equal(found, step(model, tokens[:, 2:], copied))  # with gradients: nothing is kept


def test_dropout_is_drawn_at_every_step():
    model, tokens = prefixed(prefix_dropout=0.5).train(), tokens_of()
    torch.manual_seed(0)
    expected = in_steps(model, tokens)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(in_steps(model, tokens), expected)


def test_nothing_outlives_the_cache():
    model, cache = prefixed(), DynamicCache()
    with torch.no_grad():
        step(model, tokens_of(), cache)
    assert cache in kept._shelves
    before = len(kept._shelves)
    del cache
    gc.collect()
    assert len(kept._shelves) < before


def test_a_graph_keeps_nothing(monkeypatch):
    """Its tensors would be constants there."""
    model = prefixed()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        assert kept.kept_for(DynamicCache(), [prefixkit.prefixes.require(model).attachment], ()) is None
