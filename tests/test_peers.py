"""PEFT as an oracle where it is right, and its defects shown absent here."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model

import prefixkit

TOKENS = 5


# PEFT calls what transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders_equal_peft(name):
    """Same flat prefix, same logits: PEFT is right on unpadded decoder-only models."""
    model = tiny.make(name)
    width = sum(site.width for site in prefixkit.sites(model))
    flat = tiny.random_flat(width, TOKENS)
    ids = tiny.tokens(2, 7)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=flat)
    found = tiny.logits(model, input_ids=ids)
    prefixkit.remove(model)
    peft = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=TOKENS)).eval()
    with torch.no_grad():
        peft.prompt_encoder.default.embedding.weight.copy_(flat)
    torch.testing.assert_close(found, tiny.logits(peft, input_ids=ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_layers_of_an_encoder_decoder_share_nothing(name):
    """In PEFT, layers i and i + L/2 share one prefix; here each number moves one layer's keys or values."""
    model = tiny.make(name)
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    layout = prefixkit.Layout(prefixkit.sites(model))
    weight = model.prefixkit.default.embedding.weight
    seen = {}
    for site in layout.sites:
        model.get_submodule(site.path).register_forward_hook(
            lambda module, args, output, path=site.path: seen.__setitem__(path, output[0])
        )
    order = [site.path for site in layout.sites]
    for index, site in enumerate(layout.sites):
        tiny.logits(model, **tiny.inputs(model))
        before = dict(seen)
        with torch.no_grad():
            layout.split(weight)[index].value.add_(1.0)
        tiny.logits(model, **tiny.inputs(model))
        changed = {path for path in order if not torch.equal(seen[path], before[path])}
        assert site.path in changed
        # Nothing below it in its own stack moved: no other layer holds the same numbers.
        below = [other.path for other in layout.sites if other.stack == site.stack and other.layer < site.layer]
        assert not changed & set(below)


def test_zero_is_not_called_a_no_op():
    """Zero keys and values take attention away from real tokens; nothing here says otherwise."""
    model = tiny.make("llama")
    base = tiny.logits(model, **tiny.inputs(model))
    width = sum(site.width for site in prefixkit.sites(model))
    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=torch.zeros(TOKENS, width))
    assert (tiny.logits(model, **tiny.inputs(model)) - base).abs().max() > 1e-3
