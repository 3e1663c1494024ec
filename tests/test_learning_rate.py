"""A flat prefix and an MLP want learning rates a hundred times apart, and we say so."""

from __future__ import annotations

import warnings

import pytest
import tiny
from test_methods import TestLowRank as LowRank

import prefixkit
from prefixkit.errors import MethodError


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefixkit.check_lr(config_of(LowRank.method), 5.0)  # there is nothing to compare with
