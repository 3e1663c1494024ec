"""Sliding windows: who sees the prefix, under either policy, tested by perturbation."""

from __future__ import annotations

import pytest
import tiny
import torch

import prefixkit

TOKENS, WINDOW, LENGTH = 3, 4, 9


def first_layer_only(window, attention="sdpa"):
    """One layer, so that a query sees the prefix directly or not at all."""
    model = tiny.make("mistral", num_hidden_layers=1, sliding_window=WINDOW, attention=attention)
    return prefixkit.apply(model, num_virtual_tokens=TOKENS, window=window)


def influence(model, ids, mask=None):
    """``(queries, TOKENS)``: whether a virtual token changes a query's logits."""
    weight = model.prefixkit.default.embedding.weight
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
    before = tiny.logits(model, input_ids=ids, attention_mask=mask)[0]
    changed = []
    for token in range(TOKENS):
        with torch.no_grad():
            weight[token] += 1.0
        changed.append((tiny.logits(model, input_ids=ids, attention_mask=mask)[0] - before).abs().amax(-1) > 1e-6)
        with torch.no_grad():
            weight[token] -= 1.0
    return torch.stack(changed, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pinned_is_seen_by_every_query(attention):
    assert influence(first_layer_only("pinned", attention), tiny.tokens(1, LENGTH)).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_slide_is_seen_as_ordinary_context_would_be(attention):
    """Query at P + i sees position j while P + i − j < window."""
    expected = torch.tensor([[TOKENS + i - j < WINDOW for j in range(TOKENS)] for i in range(LENGTH)])
    model = first_layer_only("slide", attention)
    assert torch.equal(influence(model, tiny.tokens(1, LENGTH)), expected)
    padded = torch.cat([torch.full((1, 2), tiny.PAD), tiny.tokens(1, LENGTH)], dim=1)
    mask = (torch.arange(LENGTH + 2) >= 2).long()[None]
    assert torch.equal(influence(model, padded, mask)[2:], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [2, 5, 9])
def test_slide_is_the_native_cache(length, attention):
    model = tiny.make("mistral", attention=attention)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, window="slide")
    ids = tiny.tokens(2, length)
    expected = tiny.logits(model, input_ids=ids)
    cache = prefixkit.to_cache(model, batch_size=2)
    weights = model.prefixkit.default.embedding.weight.detach().clone()
    prefixkit.remove(model)
    torch.testing.assert_close(tiny.logits(model, input_ids=ids, past_key_values=cache), expected, atol=1e-5, rtol=0)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, window="slide", engine="cache", init=weights)
    torch.testing.assert_close(tiny.logits(model, input_ids=ids), expected, atol=1e-5, rtol=0)


def test_left_padded_rows_under_a_window():
    model = tiny.make("mistral")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    rows = [tiny.tokens(length, seed=length) for length in (3, 9)]
    ids, mask = tiny.left_pad(rows)
    found = tiny.logits(model, input_ids=ids, attention_mask=mask)
    for row, text in enumerate(rows):
        alone = tiny.logits(model, input_ids=text[None])[0]
        torch.testing.assert_close(found[row, -len(text) :], alone, atol=1e-5, rtol=0)
    prefixkit.remove(model)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, window="slide", engine="cache")
    with pytest.raises(prefixkit.EngineError, match="^the cache engine cannot pad rows under a sliding window"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_later_token_never_changes_an_earlier_logit(name):
    model = tiny.make(name)
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    inputs = tiny.inputs(model, batch=1)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    before = tiny.logits(model, **inputs)
    for place in range(inputs[key].shape[1]):
        changed = inputs[key].clone()
        changed[0, place] = (changed[0, place] + 7) % tiny.VOCAB
        after = tiny.logits(model, **{**inputs, key: changed})
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place]), "a token sees itself"
