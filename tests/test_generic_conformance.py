"""The conformance kit on models that no plugin serves: the generic adapter finds out by watching."""

from __future__ import annotations

import pytest
from architectures.tiny_models import build
from test_conformance import FLEX_CACHE, FLEX_CACHE_TESTS
from versions import within

import prefixkit
from prefixkit.testing import Conformance, Deviation


class Generic(Conformance):
    adapter = prefixkit.generic_adapter()


class TestOPT(Generic):
    """Position ids that lead to a table with reserved rows."""

    deviations = (
        Deviation(
            "transformers does not tell packed texts apart in OPT, prefix or not",
            "test_packed_rows_equal_rows_apart",
            {"engine": "attention"},
        ),
        *([Deviation(FLEX_CACHE, *test) for test in FLEX_CACHE_TESTS] if within("4", "5.5") else []),
    )

    def make_model(self):
        return build("causal", "opt").model


class TestDeepseekV3(Generic):
    """Keys and values of different sizes; a cache of latents."""

    pytestmark = [pytest.mark.conformance, pytest.mark.rare]  # noqa: RUF012 - pytest wants a list

    def make_model(self):
        return build("causal", "deepseek_v3").model


class TestGemma3n(Generic):
    """Layers that share keys and values."""

    pytestmark = [pytest.mark.conformance, pytest.mark.rare]  # noqa: RUF012 - pytest wants a list

    def make_model(self):
        return build("causal", "gemma3n_text").model
