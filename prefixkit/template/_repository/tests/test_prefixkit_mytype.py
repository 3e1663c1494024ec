"""The adapter passes prefixkit's conformance kit, and the installed plugin is found."""

import prefixkit
import prefixkit_mytype
import pytest
from prefixkit.testing import Conformance
from transformers import GPT2Config, GPT2LMHeadModel


class TestMyType(Conformance):
    adapter = next(prefixkit_mytype.prefixkit_adapters())

    def make_model(self):
        # TODO: a tiny model of your type, with random weights. A GPT-2 stands in for it.
        # Two or three layers, numbers that differ where they could be mixed up, no dropout of any kind.
        sizes = {"vocab_size": 64, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=1))


def test_the_installed_plugin_serves_its_types():
    """It fails where the distribution is not installed, or where its entry points are not what the module serves."""
    (plugin,) = (plugin for plugin in prefixkit.plugins() if plugin.module == prefixkit_mytype.__name__)
    assert plugin.error is None
    assert plugin.distribution == "prefixkit-mytype"
    assert sorted(plugin.entry_points) == sorted(plugin.model_types) == ["mytype"]


@pytest.mark.xfail(strict=True, reason="TODO: a GPT-2 stands in for the model; take this mark out when it is yours")
def test_the_tiny_model_is_of_a_type_that_the_adapter_serves():
    assert TestMyType().make_model().config.model_type in TestMyType.adapter.model_types
