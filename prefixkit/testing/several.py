"""Several prefixes on one model, each against what it gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import prefixkit
from prefixkit.testing.subject import NEW, TOKENS, Subject, enable_checkpointing, loss_of
from prefixkit.testing.traits import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = ("first", None, "second", "first")
LENGTHS = (3, 7, 4, 6)


class Several:
    """One after the other, and each row of a call with its own."""

    def test_the_active_prefix_is_served(self, subject: Subject, engine: str) -> None:
        """Each of two prefixes gives its own numbers while it is active, and alone trains."""
        inputs = subject.inputs()
        model = subject.with_prefix(engine=engine, name="first")
        alone = subject.logits(model, **inputs)
        _second(subject, model, engine=engine)
        other = subject.logits(model, **inputs)
        assert (other - alone).abs().max() > 1e-3, "the second prefix changes nothing"
        prefixkit.activate(model, "first")
        assert torch.equal(subject.logits(model, **inputs), alone)
        trains = {name.split(".")[1] for name, value in model.named_parameters() if value.requires_grad}
        assert trains == {"first"}
        prefixkit.remove(model, "second")
        assert torch.equal(subject.logits(model, **inputs), alone)

    def test_rows_with_prefixes_of_their_own(
        self, subject: Subject, engine: str, positions: str, window: str, side: str
    ) -> None:
        """Rows padded on either side, each with its prefix or none, equal the rows alone."""
        rows = subject.ragged(*LENGTHS)
        ids, mask = subject.padded(rows, side=side)
        targets = _targets(subject)
        with subject.may_refuse(engine):
            model = _with_two(subject, engine=engine, positions=positions, window=window)
            with prefixkit.rows(model, ROWS):
                found = subject.logits(model, input_ids=ids, attention_mask=mask, **targets)
            for index, (row, name) in enumerate(zip(rows, ROWS, strict=True)):
                own = {key: value[index : index + 1] for key, value in targets.items()}
                with _only(model, name):
                    alone = subject.logits(model, input_ids=row[None], attention_mask=torch.ones_like(row)[None], **own)
                real = found[index] if subject.is_encoder_decoder else found[index][mask[index].bool()]
                torch.testing.assert_close(real, alone[0], atol=1e-4, rtol=1e-4)

    @needs("generates")
    def test_rows_generate_each_with_its_own(self, subject: Subject, engine: str) -> None:
        """Greedy and beam search on left-padded rows choose what they choose for each row alone."""
        rows = subject.ragged(*LENGTHS)
        ids, mask = subject.padded(rows)
        with subject.may_refuse(engine):
            model = _with_two(subject, engine=engine)
            for beams in (1, 3):
                with prefixkit.rows(model, ROWS):
                    found = subject.generate(model, ids, mask, num_beams=beams)[:, -NEW:]
                for index, (row, name) in enumerate(zip(rows, ROWS, strict=True)):
                    with _only(model, name):
                        alone = subject.generate(model, row[None], num_beams=beams)[0, -NEW:]
                    assert torch.equal(found[index], alone), f"row {index} with {beams} beams"

    @needs("checkpoints")
    def test_rows_train_their_own(self, subject: Subject, engine: str) -> None:
        """One batch of rows gives every prefix the gradient of its rows, under checkpointing too."""
        inputs = subject.inputs(batch=len(ROWS))
        with subject.may_refuse(engine):
            model = _with_two(subject, engine=engine, training=True)
            for name in ("first", "second"):
                prefixkit.unfreeze(model, name)
            weights = torch.linspace(1, 2, len(ROWS), device=subject.device)
            expected = _gradients_apart(subject, model, inputs, weights)
            for checkpointing in (False, True):
                if checkpointing:
                    enable_checkpointing(model)
                model.zero_grad()
                with prefixkit.rows(model, ROWS):
                    (_each(subject, model, inputs) * weights).sum().backward()
                for one, other in zip(subject.gradients(model), expected, strict=True):
                    scale = float(other.abs().max())
                    assert scale > 0, "no gradient to compare"
                    torch.testing.assert_close(one, other, atol=1e-4 * scale, rtol=1e-3)


def _second(subject: Subject, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return subject.apply(model, name="second", num_virtual_tokens=TOKENS - 2, **options)


def _with_two(subject: Subject, **options: Any) -> PreTrainedModel:
    model = subject.with_prefix(name="first", **options)
    options.pop("training", None)
    return _second(subject, model, **options)


@contextmanager
def _only(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Inside, the model has one prefix, or none."""
    if name is None:
        with prefixkit.disabled(model):
            yield
    else:
        prefixkit.activate(model, name)
        yield


def _each(subject: Subject, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """For each row a number that depends on every output differently, ``(rows,)``."""
    outputs = subject.outputs(model, **inputs)
    return torch.stack([loss_of(outputs[row : row + 1]) for row in range(len(outputs))])


def _gradients_apart(
    subject: Subject, model: PreTrainedModel, inputs: dict[str, torch.Tensor], weights: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of the prefixes, row by row with one prefix at a time."""
    for index, name in enumerate(ROWS):
        if name is None:
            continue
        prefixkit.activate(model, name)
        for other in ("first", "second"):
            prefixkit.unfreeze(model, other)
        own = {key: value[index : index + 1] for key, value in inputs.items()}
        (_each(subject, model, own) * weights[index]).sum().backward()
    return [gradient.clone() for gradient in subject.gradients(model)]


def _targets(subject: Subject) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": subject.tokens(len(ROWS), 4, seed=2)} if subject.is_encoder_decoder else {}
