"""Prefixes made of others: one behind the other, or their average."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_several import alone, classifier, everything, head_of_its_own, strong, two
from transformers import BloomConfig, BloomForCausalLM

import prefixkit

A, B, X = tiny.tokens(3, seed=5), tiny.tokens(5, seed=6), tiny.tokens(1, 4, seed=7)


def flat(model, name):
    return getattr(model.prefixkit, name).embedding.weight.detach()


def own(name, rows, **options):
    """A model of its own with this flat prefix."""
    return prefixkit.apply(tiny.make(name), num_virtual_tokens=len(rows), init=rows, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_an_average_is_of_keys_and_values(name):
    model = tiny.make(name)
    for prefix, method in (("first", "p-tuning-v2"), ("second", "prefix-tuning")):
        strong(prefixkit.apply(model, method, num_virtual_tokens=3, name=prefix), prefix)
    inputs = tiny.inputs(model)
    flats = [
        prefixkit.fold(prefixkit.activate(model, prefix)) and flat(model, prefix) for prefix in ("first", "second")
    ]
    before = [alone(model, prefix, **inputs) for prefix in ("first", "second")]
    prefixkit.average(model, {"first": 0.75, "second": -0.5})
    assert prefixkit.names(model) == ["first", "second", "average"]
    expected = own(name, 0.75 * flats[0] - 0.5 * flats[1])
    torch.testing.assert_close(tiny.logits(model, **inputs), tiny.logits(expected, **inputs), atol=1e-5, rtol=1e-5)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        "prefixkit.average.embedding.weight"
    }
    after = [alone(model, prefix, **inputs) for prefix in ("first", "second")]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_heads_are_averaged_and_kept_apart():
    model = classifier()
    for prefix, value in (("first", 1.0), ("second", 5.0)):
        strong(prefixkit.apply(model, num_virtual_tokens=3, name=prefix), prefix)
        head_of_its_own(model, prefix, value)
    prefixkit.average(model, {"first": 0.5, "second": 0.5})
    assert (model.classifier.weight == 3).all()
    assert "classifier.weight" in {name for name, value in model.named_parameters() if value.requires_grad}
    prefixkit.activate(model, "first")
    assert (model.classifier.weight == 1).all()


def test_one_behind_the_other_has_the_one_head():
    model = classifier()
    strong(prefixkit.apply(model, num_virtual_tokens=3, name="first", head=False), "first")
    strong(prefixkit.apply(model, num_virtual_tokens=2, name="second"), "second")
    head_of_its_own(model, "second", 2.0)
    prefixkit.compose(model, ["first", "second"], places="kept")
    assert (model.classifier.weight == 2).all()
    assert prefixkit.config(model).num_virtual_tokens == 5


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
@pytest.mark.parametrize("positions", ["shift", "none"])
def test_keys_that_are_kept(name, positions):
    model = two(tiny.make(name), positions=positions)
    rows = torch.cat([flat(model, "second"), flat(model, "first")])
    prefixkit.compose(model, ["second", "first"], places="kept" if positions == "shift" else None)
    inputs = tiny.inputs(model)
    expected = tiny.logits(own(name, rows, positions=positions), **inputs)
    torch.testing.assert_close(tiny.logits(model, **inputs), expected)


def bare_on_both(model, places):
    """The bare model on ``[A; B; X]``, in which B does not see A, with tokens at ``places``: logits of X."""
    ids = torch.cat([A, B])[None]
    ids = torch.cat([ids, X], dim=1)
    seen = torch.ones(len(ids[0]), len(ids[0])).tril().bool()
    seen[len(A) : len(A) + len(B), : len(A)] = False
    mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return tiny.logits(model, input_ids=ids, attention_mask=mask, position_ids=places[None])[:, -len(X[0]) :]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("places", ["consecutive", "aligned"])
def test_two_texts_stand_where_it_is_said(name, places):
    attention = {"attn_implementation": "eager"}
    model = tiny.make(name, attention=attention["attn_implementation"])
    lengths, total = (len(A), len(B)), len(A) + len(B)
    starts = (0, len(A)) if places == "consecutive" else (total - lengths[0], total - lengths[1])
    stands = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    if name == "gemma3":  # takes a mask for each kind of layer; one without windows serves both here
        model.config.sliding_window = 64
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None if layer.self_attn.sliding_window is None else 64
    expected = bare_on_both(model, torch.cat([*stands, torch.arange(total, total + len(X[0]))]))
    for prefix, text in (("a", A), ("b", B)):
        prefixkit.apply(model, num_virtual_tokens=len(text), name=prefix, init=prefixkit.TextInit(text))
    prefixkit.compose(model, ["a", "b"], places=places)
    torch.testing.assert_close(tiny.logits(model, input_ids=X), expected, atol=2e-5, rtol=1e-4)


def test_a_bias_on_distances_goes_by_order():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4)).eval()
    two(model)
    rows = torch.cat([flat(model, "first"), flat(model, "second")])
    prefixkit.compose(model, ["first", "second"], places="consecutive")
    found = tiny.logits(model, input_ids=X)
    prefixkit.apply(prefixkit.remove(model), num_virtual_tokens=len(rows), init=rows)
    torch.testing.assert_close(found, tiny.logits(model, input_ids=X))


def test_composed_it_trains_and_is_saved(tmp_path):
    model = two(tiny.make("llama"))
    prefixkit.compose(model, ["first", "second"], places="consecutive")
    model(input_ids=X, labels=X).loss.backward()
    assert model.prefixkit.composed.embedding.weight.grad.abs().max() > 0
    assert model.prefixkit.first.embedding.weight.grad is None
    prefixkit.save(model, tmp_path)
    fresh = prefixkit.load(tiny.make("llama"), tmp_path)
    assert torch.equal(tiny.logits(fresh, input_ids=X), tiny.logits(model, input_ids=X))


def with_more(model):
    two(model)
    prefixkit.apply(model, num_virtual_tokens=3, name="gated", gate=True, positions="none")
    prefixkit.apply(model, num_virtual_tokens=4, name="unmoved", positions="none")
    prefixkit.apply(model, num_virtual_tokens=4, name="shallow", layers=[0])
    prefixkit.apply(model, num_virtual_tokens=4, name="uneven", layer_tokens={0: 1})
    return model


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (
            lambda m: prefixkit.compose(m, ["first", "second"]),
            "ConfigError",
            "possible here: kept, consecutive, aligned",
        ),
        (lambda m: prefixkit.compose(m, ["first", "second"], places="near"), "ConfigError", "places is 'near'"),
        (lambda m: prefixkit.compose(m, ["first", "first"], places="kept"), "ConfigError", "not two prefixes or more"),
        (lambda m: prefixkit.compose(m, ["first"], places="kept"), "ConfigError", "not two prefixes or more"),
        (lambda m: prefixkit.compose(m, ["first", "thrid"]), "AttachmentError", "no prefix 'thrid'"),
        (
            lambda m: prefixkit.compose(m, ["first", "second"], name="first", places="kept"),
            "AttachmentError",
            "has a prefix 'first'",
        ),
        (lambda m: prefixkit.compose(m, ["first", "gated"]), "ConfigError", "'gated' has a gate"),
        (lambda m: prefixkit.compose(m, ["first", "unmoved"]), "ConfigError", "positions of prefix 'unmoved'"),
        (lambda m: prefixkit.compose(m, ["first", "shallow"]), "ConfigError", "sites of prefix 'shallow'"),
        (lambda m: prefixkit.compose(m, ["first", "uneven"], places="kept"), "ConfigError", "layers of other lengths"),
        (lambda m: prefixkit.average(m, {"first": 1, "second": 1}), "ConfigError", "length of prefix 'second'"),
        (lambda m: prefixkit.average(m, {"first": 1}), "ConfigError", "not two prefixes or more"),
    ],
)
def test_what_cannot_be_combined(action, error, message):
    model = with_more(tiny.make("llama"))
    before = everything(model)
    with pytest.raises(getattr(prefixkit, error), match=message):
        action(model)
    after = everything(model)
    assert before[2:] == after[2:]
    assert before[0] == after[0]


def test_positions_that_are_in_the_keys_for_good():
    model = two(tiny.make("gpt2"))
    with pytest.raises(prefixkit.EngineError, match="keys cannot be turned"):
        prefixkit.compose(model, ["first", "second"], places="consecutive")
    assert prefixkit.names(model) == ["first", "second"]


def test_only_one_head_can_be_composed():
    model = two(classifier())
    with pytest.raises(prefixkit.ConfigError, match="'first', 'second' have heads of their own"):
        prefixkit.compose(model, ["first", "second"], places="kept")
