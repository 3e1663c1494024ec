"""Ways to train, each against the plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from prefixkit.errors import EngineError
from prefixkit.testing.subject import Subject, enable_checkpointing, loss_of
from prefixkit.testing.traits import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dynamo itself reads .grad of every tensor that is handed down between modules.
dynamo_reads_grad: pytest.MarkDecorator = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)
# So it does with autograd functions, in the masks of transformers 4.
dynamo_makes_functions: pytest.MarkDecorator = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


class Training:
    """Checkpointing, precision, packing, accumulation and compilation."""

    @needs("checkpoints")
    @pytest.mark.parametrize("first", ["apply", "checkpointing"])
    def test_checkpointing_gives_equal_gradients(self, subject: Subject, engine: str, method: str, first: str) -> None:
        """Gradient checkpointing, enabled before or after apply, gives equal gradients."""
        with subject.may_refuse(engine):
            expected = _two_forwards(subject, subject.with_prefix(engine=engine, method=method, training=True))
            model = subject.bare(training=True)
            if first == "checkpointing":
                enable_checkpointing(model)
            subject.apply(model, engine=engine, method=method)
            if first == "apply":
                enable_checkpointing(model)
            _assert_equal(_two_forwards(subject, model), expected)

    @needs("checkpoints")
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of a stack without prefix
    def test_reentrant_checkpointing_is_right_or_refused(self, subject: Subject, engine: str, method: str) -> None:
        """Reentrant checkpointing gives equal gradients or a clear error."""
        model = subject.with_prefix(engine=engine, method=method, training=True)
        expected = _gradient(subject, model)
        model.zero_grad()
        enable_checkpointing(model, reentrant=True)
        try:
            found = _gradient(subject, model)
        except EngineError as error:
            subject.refusals.append(str(error))
        else:
            _assert_equal([found], [expected])

    @needs("checkpoints", "reachable")
    def test_dropout_of_the_prefix_is_the_same_when_recomputed(self, subject: Subject) -> None:
        """Dropout of the prefix drops the same part when layers are recomputed, and nothing in evaluation."""
        model = subject.with_prefix(training=True, prefix_dropout=0.5)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                enable_checkpointing(model)
            torch.manual_seed(0)
            model.zero_grad()
            subject.loss(model, **subject.inputs()).backward()
            found.append(subject.gradients(model))
        _assert_equal(found[1], found[0])
        share = (found[0][0] == 0).float().mean()
        assert 0.2 < share < 0.8, f"{share:.0%} dropped"
        expected = subject.logits(subject.with_prefix(), **subject.inputs())
        model.train(False)
        torch.testing.assert_close(subject.logits(model, **subject.inputs()), expected)

    def test_half_precision_base(self, subject: Subject, engine: str, dtype: str) -> None:
        """A half-precision base trains a float32 prefix with the float32 base's gradient, nearly."""
        expected = _gradient(subject, subject.with_prefix(engine=engine))
        model = subject.bare().to(getattr(torch, dtype))
        subject.apply(model, engine=engine)
        trained = [value for value in model.parameters() if value.requires_grad]
        assert {value.dtype for value in trained} == {torch.float32}
        _assert_alike(_gradient(subject, model), expected)

    def test_autocast(self, subject: Subject, engine: str) -> None:
        """Under autocast the gradient is that of full precision, nearly."""
        model = subject.with_prefix(engine=engine)
        expected = _gradient(subject, model)
        model.zero_grad()
        with torch.autocast(subject.device.type, dtype=torch.bfloat16):
            found = _gradient(subject, model)
        _assert_alike(found, expected)

    @needs("packs")
    def test_packed_rows_equal_rows_apart(self, subject: Subject, engine: str, positions: str, window: str) -> None:
        """Texts packed in one row by their positions equal the texts apart, gradients too."""
        rows = subject.ragged(4, 7, 1, 3)
        packed = torch.cat(rows)[None]
        places = torch.cat([torch.arange(len(row)) for row in rows])[None].to(packed.device)
        places += subject.traits.first_position
        with subject.may_refuse(engine):
            model = subject.with_prefix(engine=engine, positions=positions, window=window)
            apart = torch.cat([subject.outputs(model, input_ids=row[None]) for row in rows], dim=1)
            loss_of(apart).backward()
            expected = subject.gradients(model)
            model.zero_grad()
            found = subject.outputs(model, input_ids=packed, position_ids=places, use_cache=False)
            _bare_tells_apart(subject, rows, packed, places)
            torch.testing.assert_close(found, apart, atol=1e-4, rtol=1e-4)
            loss_of(found).backward()
            _assert_equal(subject.gradients(model), expected)

    def test_accumulated_gradients(self, subject: Subject, engine: str, method: str) -> None:
        """Gradients accumulated over two half batches are those of the whole batch."""
        model = subject.with_prefix(engine=engine, method=method)
        inputs = subject.inputs(batch=4)
        subject.loss(model, **inputs).backward()
        expected = subject.gradients(model)
        model.zero_grad()
        for half in (slice(2), slice(2, None)):
            part = {name: value[half] for name, value in inputs.items()}
            (subject.loss(model, **part) / 2).backward()
        _assert_equal(subject.gradients(model), expected)

    @dynamo_reads_grad
    @dynamo_makes_functions
    def test_compiled_forward(self, subject: Subject, engine: str) -> None:
        """torch.compile gives the same outputs, with the attention engine in one graph."""
        model = subject.with_prefix(engine=engine)
        inputs = subject.inputs()
        expected = subject.logits(model, **inputs)
        torch.compiler.reset()
        compiled: Any = torch.compile(model, fullgraph=engine == "attention", backend="aot_eager")
        found = subject.logits(compiled, **inputs)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    @dynamo_reads_grad
    @dynamo_makes_functions
    @pytest.mark.slow
    def test_compiled_training_step(self, subject: Subject, method: str) -> None:
        """Three compiled training steps end at the same prefix as three plain ones."""
        results = []
        for compiled in (False, True):
            torch.compiler.reset()
            model = subject.with_prefix(method=method, training=True)
            trained = [value for value in model.parameters() if value.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=1e-4)
            run = torch.compile(model, backend="aot_eager") if compiled else model
            for _ in range(3):
                optimizer.zero_grad()
                subject.loss(run, **subject.inputs()).backward()  # type: ignore[arg-type]
                optimizer.step()
            results.append([value.detach().clone() for value in trained])
        _assert_equal(results[1], results[0])


def _bare_tells_apart(subject: Subject, rows: list[torch.Tensor], packed: torch.Tensor, places: torch.Tensor) -> None:
    """Whether a failure would be the bare model's already."""
    bare = subject.bare()
    apart = torch.cat([subject.logits(bare, input_ids=row[None]) for row in rows], dim=1)
    found = subject.logits(bare, input_ids=packed, position_ids=places, use_cache=False)
    message = "the bare model does not tell packed texts apart"
    torch.testing.assert_close(found, apart, atol=1e-4, rtol=1e-4, msg=message)


def _two_forwards(subject: Subject, model: PreTrainedModel) -> list[torch.Tensor]:
    """Gradients of two forwards, one of them padded, before one backward."""
    model.zero_grad()
    first, second = subject.inputs(), subject.inputs()
    second["attention_mask"] = second["attention_mask"].clone()
    second["attention_mask"][0, -3:] = 0
    (subject.loss(model, **first) + 2 * subject.loss(model, **second)).backward()
    return subject.gradients(model)


def _gradient(subject: Subject, model: PreTrainedModel) -> torch.Tensor:
    subject.loss(model, **subject.inputs()).backward()
    return torch.cat([gradient.reshape(-1) for gradient in subject.gradients(model)])


def _assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal up to the order of summation, measured against the largest number."""
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0, "no gradient to compare"
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=1e-3)


def _assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Nearly the same direction and length: half precision keeps two to three digits."""
    assert torch.isfinite(found).all()
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    assert cosine > 0.97, f"cosine {cosine:.3f}"
    assert 0.8 < found.norm() / expected.norm() < 1.25
