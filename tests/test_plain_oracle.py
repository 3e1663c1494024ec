"""The kit's oracle for encoders off the attention interface sees what is wrong with a ``site_forward``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import prefixkit_encoders
import pytest
import torch
from test_prefixkit_encoders import TestDebertaV2 as DebertaV2, TestMPNet as MPNet, TestRoFormer as RoFormer

import prefixkit
from prefixkit.testing import Subject
from prefixkit.testing.arithmetic import Watch, watched
from prefixkit.testing.prompt import text_as_prompt


def scaled(module, hidden_states, attention_mask, **options):
    """As many write it: the scale on the keys, and so on the prefix."""
    own = prefixkit_encoders.attend

    def attend(module, query, key, value, mask):
        return own(module, query, key * 2, value, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixkit_encoders, "attend", attend)
        return prefixkit_encoders.deberta_v2(module, hidden_states, attention_mask, **options)


def turned_too(module, hidden_states, attention_mask=None, *, sinusoidal_pos=None, **options):
    """The text one place on."""
    moved = torch.cat([sinusoidal_pos[:, :, 1:], sinusoidal_pos[:, :, -1:]], dim=2)
    return prefixkit_encoders.roformer(module, hidden_states, attention_mask, sinusoidal_pos=moved, **options)


def unbiased(config):
    return replace(prefixkit_encoders.mpnet_positions(config), prefix_bias=None)


def miscounted(config):
    positions = prefixkit_encoders.mpnet_positions(config)
    return replace(positions, offset=positions.offset + 1)


@pytest.mark.parametrize(
    ("family", "model_type", "changes", "shift"),
    [
        (DebertaV2, "deberta-v2", {"site_forward": scaled}, False),
        (RoFormer, "roformer", {"site_forward": turned_too}, False),
        (MPNet, "mpnet", {"positions": unbiased}, True),
        (MPNet, "mpnet", {"positions": miscounted}, False),
    ],
    ids=["scaled", "turned", "unbiased", "miscounted"],
)
def test_a_wrong_adapter_is_seen(family, model_type, changes, shift):
    wrong = {model_type: replace(prefixkit_encoders.FAMILIES[model_type], **changes)}
    stacks = partial(prefixkit_encoders.stacks, families=wrong)
    subject = Subject(prefixkit.Adapter(model_types=(model_type,), stacks=stacks), family().make_model)
    subject.traits = family.traits
    with pytest.raises(AssertionError, match="not close"):
        text_as_prompt(subject, engine="attention", attention="eager", shift=shift, pinned=True)


def test_watching_changes_nothing():
    subject = Subject(DebertaV2.adapter, DebertaV2().make_model)
    model, inputs = subject.bare(), subject.inputs()
    expected = subject.logits(model, **inputs)
    with watched(Watch(model)) as watch:
        assert torch.equal(subject.logits(model, **inputs), expected)
    assert [call.key.shape for call in watch.found] == [(2, 4, 7, 8)] * 2
    assert all("position_bias" in call.options for call in watch.found)
