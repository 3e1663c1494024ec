"""Who sees what, found out by perturbation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import prefixkit
from prefixkit.testing.recording import (
    recorded_calls,
    seen_inside,
    set_attention_implementation,
    uncompiled,
)
from prefixkit.testing.subject import TOKENS, Subject
from prefixkit.testing.traits import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 9


class Attention:
    """Every attention implementation, windows under both policies, causality and padding."""

    def test_attention_implementations_agree(self, subject: Subject, engine: str, window: str) -> None:
        """All attention implementations give the same outputs, with padding and without a mask."""
        ids, mask = subject.padded(subject.ragged(LENGTH, 4))
        whole = {name: value for name, value in subject.inputs().items() if name != "attention_mask"}
        padded = {**whole, "input_ids": ids, "attention_mask": mask}
        for inputs in (whole, padded):
            real = mask.bool() if inputs is padded and not subject.is_encoder_decoder else ...
            with subject.may_refuse(engine):
                model = subject.with_prefix(engine=engine, window=window)
                found = []
                for attention in subject.traits.implementations:
                    set_attention_implementation(model, attention)
                    with uncompiled():
                        found.append(subject.logits(model, **inputs))
                for other in found[1:]:
                    torch.testing.assert_close(other[real], found[0][real], atol=1e-4, rtol=1e-4)

    def test_every_query_sees_the_prefix(self, subject: Subject, attention: str) -> None:
        """Pinned, every virtual token is seen by every query of every site."""
        with uncompiled():
            model = subject.with_prefix(attention=attention)
            for path, seen in influence(subject, model).items():
                assert seen.all(), f"{path}: {seen}"

    @needs("windowed")
    def test_a_sliding_prefix_leaves_the_window_as_context_does(
        self, subject: Subject, engine: str, attention: str, positions: str
    ) -> None:
        """Sliding, a virtual token is seen exactly where a real token in its place would be."""
        expected = _seen_by_the_bare_model(subject)
        with subject.may_refuse(engine), uncompiled():
            model = subject.with_prefix(engine=engine, attention=attention, window="slide", positions=positions)
            for path, seen in influence(subject, model).items():
                assert torch.equal(seen, expected[path]), f"{path}: {seen}"

    @needs("decodes")
    def test_a_later_token_changes_no_earlier_output(self, subject: Subject, engine: str, attention: str) -> None:
        """Changing a token changes its own output and all after it, and none before."""
        name = "decoder_input_ids" if subject.is_encoder_decoder else "input_ids"
        inputs = subject.inputs(batch=1, length=6, targets=6)
        with subject.may_refuse(engine), uncompiled():
            model = subject.with_prefix(engine=engine, attention=attention)
            before = subject.logits(model, **inputs)
            for place in range(6):
                ids = inputs[name].clone()
                ids[0, place] = next(token for token in range(3, 9) if token != ids[0, place])
                after = subject.logits(model, **{**inputs, name: ids})
                changes = (after - before).abs().amax(-1)  # experts sum in another order: not to the last bit
                assert (changes[:, :place] < 1e-5).all()
                later = changes[:, place:] > 1e-5
                assert later.all(), f"token {place} is seen by {later.tolist()} from itself on"

    def test_padding_is_not_seen(self, subject: Subject, engine: str, attention: str, side: str) -> None:
        """What stands in the padding changes no output."""
        ids, mask = subject.padded(subject.ragged(LENGTH, 4), side=side)
        inputs = {**subject.inputs(), "input_ids": ids, "attention_mask": mask}
        real = ... if subject.is_encoder_decoder else mask.bool()
        with subject.may_refuse(engine), uncompiled():
            model = subject.with_prefix(engine=engine, attention=attention)
            before = subject.logits(model, **inputs)
            other = torch.where(mask.bool(), ids, subject.tokens(*ids.shape, seed=9))
            after = subject.logits(model, **{**inputs, "input_ids": other})
            torch.testing.assert_close(after[real], before[real], atol=1e-6, rtol=1e-6)


def influence(subject: Subject, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """For each site ``(queries, P)``: whether a virtual token of that site changes the site's output.

    Only one site's prefix is changed at a time, so that its input is the same and nothing but a
    direct look at the virtual token can change its output.
    """
    weight = subject.flat_of(model)
    inputs = subject.inputs(batch=1, length=LENGTH, targets=LENGTH)
    found: dict[str, torch.Tensor] = {}
    start = 0
    for site in prefixkit.sites(model):
        before = _output_of(subject, model, site.path, inputs)
        changed = []
        for token in range(TOKENS):
            part = weight.data[token, start : start + site.width]
            kept = part.clone()
            part.add_(1.0)
            changed.append((_output_of(subject, model, site.path, inputs) - before).abs().amax(-1)[0] > 1e-6)
            part.copy_(kept)
        found[site.path] = torch.stack(changed, dim=1)
        start += site.width
    return found


def _output_of(subject: Subject, model: PreTrainedModel, path: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the attention module ``path`` gives, ``(batch, queries, width)``."""
    kept: list[torch.Tensor] = []

    handle = model.get_submodule(path).register_forward_hook(lambda *call: kept.append(_first(call[-1]).detach()))
    try:
        subject.logits(model, **inputs)
    finally:
        handle.remove()
    return kept[0]


def _first(output: Any) -> torch.Tensor:
    """The first tensor of what a module returned, however it is packed."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _seen_by_the_bare_model(subject: Subject) -> dict[str, torch.Tensor]:
    """For each attention module ``(LENGTH, P)``: which of the first P tokens its later queries see."""
    model = subject.bare()
    ids = subject.tokens(1, TOKENS + LENGTH)
    with recorded_calls(model) as calls:
        subject.logits(model, input_ids=ids)
    if not subject.traits.on_interface:
        return {call.path: seen_inside(model, call.path, ids)[TOKENS:, :TOKENS] for call in calls}
    seen = {}
    for call in calls:
        assert call.mask is not None
        seen[call.path] = call.mask[0, 0, TOKENS:, :TOKENS] == 0
    return seen
