"""The conformance kit on models that no plugin serves: the generic adapter finds out by watching."""

from __future__ import annotations

from architectures.tiny_models import build

import prefixkit
from prefixkit.testing import Conformance


class Generic(Conformance):
    adapter = prefixkit.generic_adapter()


class TestOPT(Generic):
    """Position ids that lead to a table with reserved rows."""

    def make_model(self):
        return build("causal", "opt").model


class TestDeepseekV3(Generic):
    """Keys and values of different sizes; a cache of latents."""

    def make_model(self):
        return build("causal", "deepseek_v3").model


class TestMarian(Generic):
    """Three prefixes, and a table of sinusoidal positions."""

    def make_model(self):
        return build("seq2seq", "marian").model


class TestM2M100(Generic):
    """Positions that cannot be moved."""

    def make_model(self):
        return build("seq2seq", "m2m_100").model


class TestALBERT(Generic):
    """Layers that share one module."""

    def make_model(self):
        return build("encoder", "albert").model


class TestModernBERT(Generic):
    """Windows to both sides."""

    def make_model(self):
        return build("encoder", "modernbert").model


class TestQwen3Next(Generic):
    """Attention in some layers only."""

    def make_model(self):
        return build("causal", "qwen3_next").model


class TestGemma3n(Generic):
    """Layers that share keys and values."""

    def make_model(self):
        return build("causal", "gemma3n_text").model
