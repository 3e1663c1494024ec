"""A flat prefix and an MLP want learning rates a hundred times apart, and we say so."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from test_methods import TestLowRank as LowRank

import prefixkit
from prefixkit.errors import AttachmentError, ConfigError, MethodError


def config_of(method, **options):
    return prefixkit.config(prefixkit.apply(tiny.make("gpt2"), method, num_virtual_tokens=4, **options))


def test_it_goes_by_what_is_parametrised_and_not_by_the_name():
    flat, mlp = (prefixkit.recommended_lr(config_of(method)) for method in ("p-tuning-v2", "prefix-tuning"))
    assert flat >= 50 * mlp
    assert prefixkit.recommended_lr(config_of("p-tuning-v2", prefix_projection=True)) == mlp
    assert prefixkit.recommended_lr(config_of("prefix-tuning", prefix_projection=False)) == flat


def test_a_folded_prefix_is_flat():
    model = prefixkit.apply(tiny.make("gpt2"), "prefix-tuning", num_virtual_tokens=4)
    prefixkit.fold(model)
    assert prefixkit.recommended_lr(prefixkit.config(model)) == prefixkit.recommended_lr(config_of("p-tuning-v2"))


def test_an_mlps_rate_for_a_flat_prefix_is_warned_of():
    with pytest.warns(UserWarning, match="^learning rate 0.001 is far from the 0.1 that suits method 'p-tuning-v2'"):
        prefixkit.check_lr(config_of("p-tuning-v2"), 0.001)
    with pytest.warns(UserWarning, match="^learning rate 0.1 is far from the 0.0005 that suits method 'prefix-tuning'"):
        prefixkit.check_lr(config_of("prefix-tuning"), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefixkit.check_lr(config_of("p-tuning-v2"), 0.03)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-memory"])
def test_every_built_in_method_has_one(method):
    model = tiny.make("gpt2")
    prefixkit.apply(model, method, num_virtual_tokens=1)
    assert 0 < prefixkit.recommended_lr(prefixkit.config(model)) < 1


def test_a_method_that_recommends_none(monkeypatch):
    monkeypatch.setattr(
        "prefixkit.learning_rate.installed", lambda: type("R", (), {"method": lambda *_: LowRank.method})
    )
    with pytest.raises(MethodError, match="^method 'low-rank' recommends no learning rate; sweep one"):
        prefixkit.recommended_lr(config_of(LowRank.method))


def rates_by_name(model, groups):
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(value)]: group["lr"] for group in groups for value in group["params"]}


def classifier(method="prefix-tuning", **options):
    return prefixkit.apply(tiny.encoder("SequenceClassification"), method, num_virtual_tokens=4, **options)


def test_groups_have_all_that_trains_each_at_its_rate():
    model = classifier()
    rates = rates_by_name(model, prefixkit.parameter_groups(model))
    assert rates.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[0]: rate for name, rate in rates.items()} == {"prefixkit": 0.0005, "classifier": 0.1}
    assert [group["lr"] for group in prefixkit.parameter_groups(model, lr=0.001, head_lr=0.03)] == [0.001, 0.03]


def test_groups_of_several_prefixes_go_by_the_method_of_each():
    model = prefixkit.apply(tiny.make("gpt2"), "prefix-tuning", num_virtual_tokens=4, name="head")
    prefixkit.apply(model, "p-tuning-v2", num_virtual_tokens=4, name="other")
    prefixkit.unfreeze(model, "head")
    rates = rates_by_name(model, prefixkit.parameter_groups(model))
    assert {name.split(".")[1]: rate for name, rate in rates.items()} == {"head": 0.0005, "other": 0.1}


def test_a_head_trains_at_its_own_rate_beside_an_mlp():
    """With plain SGD a step is the rate times the gradient, written out."""
    model = classifier(prefix_dropout=0.0).train()
    optimizer = torch.optim.SGD(prefixkit.parameter_groups(model))
    model(**tiny.inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    optimizer.step()
    for name, value in model.named_parameters():
        if value.requires_grad:
            rate = 0.1 if name.startswith("classifier.") else 0.0005
            torch.testing.assert_close(value, before[name] - rate * value.grad)


def test_what_is_neither_prefix_nor_head_needs_a_rate():
    model = classifier("p-tuning-v2")
    norm = next(value for name, value in model.named_parameters() if name.endswith("LayerNorm.weight"))
    norm.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"LayerNorm.weight.: neither prefix nor head, and set to train"):
        prefixkit.parameter_groups(model)
    groups = prefixkit.parameter_groups(model, other_lr=0.0001)
    assert groups[-1]["lr"] == 0.0001
    assert groups[-1]["params"][0] is norm
    assert [group["lr"] for group in groups] == [0.1, 0.1, 0.0001]


def test_nothing_to_group():
    with pytest.raises(AttachmentError, match="has no prefix"):
        prefixkit.parameter_groups(tiny.make("gpt2"))
    model = prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4).requires_grad_(False)
    with pytest.raises(AttachmentError, match="^nothing of this model trains; call prefixkit.unfreeze"):
        prefixkit.parameter_groups(model)


def test_a_rate_far_off_is_warned_of_in_groups_too():
    with pytest.warns(UserWarning, match="^learning rate 0.1 is far from the 0.0005"):
        prefixkit.parameter_groups(classifier(), lr=0.1)
