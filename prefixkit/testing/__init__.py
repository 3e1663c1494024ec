"""The conformance kit: a plugin's author subclasses one class and inherits all the tests.

Example::

    class TestMine(Conformance):
        adapter = next(my_plugin.prefixkit_adapters())

        def make_model(self):
            return MyModelForCausalLM(MyConfig(hidden_size=32, num_hidden_layers=3, vocab_size=64))

The tests compare with oracles that do not use the adapter: what a forward pass of the bare model
really calls, the same text as a prompt, the other engine, whole forwards without a cache. They use
the given adapter and never look for an installed one.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(f"prefixkit.testing.{name}" for name in ("accelerated", "attention", "generation", "life", "numbers")),
    *(f"prefixkit.testing.{name}" for name in ("methods", "parallel", "prompt", "sites", "training", "with_trainer")),
)

from prefixkit.testing.conformance import Conformance  # noqa: E402 - assert rewriting comes first
from prefixkit.testing.deviation import Deviation  # noqa: E402
from prefixkit.testing.methods import MethodConformance  # noqa: E402
from prefixkit.testing.subject import Subject  # noqa: E402
from prefixkit.testing.traits import Traits, needs  # noqa: E402

__all__ = ["Conformance", "Deviation", "MethodConformance", "Subject", "Traits", "needs"]
