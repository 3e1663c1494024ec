"""What attention off transformers' attention interface is refused with, and which engine it gets."""

from __future__ import annotations

from functools import partial

import prefixkit_legacy
import prefixkit_llama
import pytest
import test_prefixkit_legacy
import tiny
import torch
from changed_adapters import with_site_forward

import prefixkit
from prefixkit import transformers_internals as internals
from prefixkit.errors import EngineError
from prefixkit.prefixes import find
from prefixkit.testing.recording import uncompiled

GPTJ = test_prefixkit_legacy.TestGPTJ
pytestmark = pytest.mark.skipif(
    not prefixkit_legacy.transformers_is("5.5"), reason="the cache engine alone serves it here"
)


def apply(adapter, model=None, **options):
    model = model or GPTJ().make_model().eval()
    return prefixkit.apply(model, num_virtual_tokens=3, adapter=adapter, **options)


def engine_of(model):
    return find(model).attachment.engine.name


def test_the_engine_is_chosen_by_what_the_adapter_brings():
    assert engine_of(apply(GPTJ.adapter)) == "attention"
    assert engine_of(apply(with_site_forward(GPTJ.adapter, None))) == "cache"


def test_flash_attention_gets_the_cache_engine():
    def made():
        model = GPTJ().make_model()
        model.config._attn_implementation_internal = "flash_attention_2"
        return model

    assert engine_of(apply(GPTJ.adapter, made())) == "cache"
    with pytest.raises(EngineError, match="^the attention of 'transformer' was made as 'flash_attention_2'"):
        apply(GPTJ.adapter, made(), engine="attention")


def test_a_forward_of_another_version_is_named():
    model = apply(with_site_forward(GPTJ.adapter, partial(prefixkit.through_cache, cache_name="past_key_value")))
    with pytest.raises(
        EngineError, match="^GPTJAttention.forward takes no 'past_key_value' in transformers .*layer_past"
    ):
        model(tiny.tokens(4)[None])


def test_attention_that_leaves_its_cache_aside_is_named(monkeypatch):
    def forward(self, hidden_states, layer_past=None, attention_mask=None, **_):
        return hidden_states, None

    model = apply(GPTJ.adapter)
    monkeypatch.setattr(type(model.transformer.h[0].attn), "forward", forward)
    with pytest.raises(EngineError, match="^GPTJAttention.forward does not use its 'layer_past'; pass engine='cache'$"):
        model(tiny.tokens(4)[None])


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_the_attention_engine_leaves_the_cache_alone(engine):
    model = apply(GPTJ.adapter, engine=engine)
    with torch.no_grad():
        cache = model(tiny.tokens(4)[None], use_cache=True).past_key_values
    assert cache.get_seq_length() == (4 if engine == "attention" else 7)


def test_a_site_forward_on_the_interface_puts_the_prefix_in_front_once():
    """As a plugin for older versions of transformers may bring it."""
    model, ids = tiny.make("llama", attention="eager"), tiny.tokens(2, 6)
    flat = torch.randn(3, sum(site.width for site in prefixkit.sites(model)))
    right = next(prefixkit_llama.prefixkit_adapters())
    found = []
    for adapter in (right, with_site_forward(right, partial(prefixkit.through_cache, cache_name="past_key_values"))):
        apply(adapter, model, init=flat)
        with torch.no_grad():
            found.append(model(ids).logits)
        prefixkit.remove(model)
    torch.testing.assert_close(*found)


def test_a_mask_that_cannot_be_widened_is_named():
    model = tiny.make("llama", attention="flex_attention")
    right = next(prefixkit_llama.prefixkit_adapters())
    apply(with_site_forward(right, partial(prefixkit.through_cache, cache_name="past_key_values")), model, init="zeros")
    with uncompiled(), pytest.raises(EngineError, match="^LlamaAttention was given a BlockMask .*'eager'$"):
        model(tiny.tokens(2, 6))


def test_a_bias_that_no_engine_could_use_is_not_what_is_named():
    """As on the versions of transformers for which the plugin brings no attention of its own."""
    bloom = test_prefixkit_legacy.TestBLOOM
    adapter, made = with_site_forward(bloom.adapter, None), bloom().make_model
    assert engine_of(apply(adapter, made())) == "cache"
    with pytest.raises(EngineError, match="BloomAttention, does not go through transformers' attention interface"):
        apply(adapter, made(), engine="attention")
    with pytest.raises(EngineError, match="engine cannot reach it; and positions='none' .*; positions='shift'$"):
        apply(adapter, made(), positions="none")


class Renamed(torch.nn.Module):
    """Attention whose cache has another name than an adapter knows."""

    def forward(self, hidden_states, attention_mask=None, cache=None):
        raise NotImplementedError


def test_a_cache_of_another_name_is_not_swallowed():
    def older(module, hidden_states, attention_mask=None, past_key_values=None, **_):
        raise NotImplementedError

    def of_both(module, hidden_states, attention_mask=None, past_key_values=None, cache=None, **_):
        raise NotImplementedError

    assert not internals.takes_what(Renamed(), older)
    assert internals.takes_what(Renamed(), of_both)
    assert internals.takes_what(Renamed(), prefixkit.through_cache)
