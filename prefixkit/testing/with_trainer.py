"""An untouched ``Trainer``: what it saves, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version

import prefixkit
from prefixkit.errors import EngineError
from prefixkit.testing.life import tensors_of
from prefixkit.testing.subject import Subject, loss_of, numbers_of
from prefixkit.testing.traits import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The data loader of Trainer asks for pinned memory, which a machine without an accelerator lacks.
trainer_pins_memory: pytest.MarkDecorator = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

STEPS = 2


class WithTrainer:
    """Trainer, its checkpoints, and going on from them."""

    @trainer_pins_memory
    def test_resume_ends_where_an_uninterrupted_run_ends(
        self, subject: Subject, engine: str, method: str, tmp_path: Path
    ) -> None:
        """Resume from a Trainer checkpoint ends at the prefix of an uninterrupted run."""
        with subject.may_refuse(engine):
            _resume(subject, tmp_path, engine=engine, method=method)

    @needs("checkpoints", "reachable")
    @trainer_pins_memory
    def test_resume_under_checkpointing(self, subject: Subject, method: str, tmp_path: Path) -> None:
        """Resume under gradient checkpointing ends at the prefix of an uninterrupted run."""
        model = _resume(subject, tmp_path, checkpointing=True, method=method)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    @needs("checkpoints", "caches")
    @trainer_pins_memory
    def test_cache_engine_refuses_checkpointing(self, subject: Subject, tmp_path: Path) -> None:
        """Trainer with gradient checkpointing on the cache engine raises a clear error."""
        run = _trainer(subject, subject.with_prefix(engine="cache"), tmp_path, checkpointing=True)
        with pytest.raises(EngineError, match="cannot train under gradient checkpointing") as caught:
            _train(run)
        subject.refusals.append(str(caught.value))

    @trainer_pins_memory
    def test_trainer_checkpoints_hold_no_base_weights(self, subject: Subject, method: str, tmp_path: Path) -> None:
        """A Trainer checkpoint holds the prefix and the head and no base weight, and load() takes it."""
        model = subject.with_prefix(method=method)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        _train(_trainer(subject, model, tmp_path))
        folder = tmp_path / f"checkpoint-{STEPS}"
        assert tensors_of(folder / "model.safetensors").keys() == trained
        weights = {file.name for file in folder.iterdir() if file.suffix in {".safetensors", ".bin"}}
        assert weights == {"model.safetensors", "prefix.safetensors", "training_args.bin"}
        loaded = prefixkit.load(subject.bare(), folder, adapter=subject.adapter)
        expected = subject.logits(model.train(False), **subject.inputs())
        assert torch.equal(subject.logits(loaded, **subject.inputs()), expected)

    @trainer_pins_memory
    def test_best_model_at_end(self, subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """load_best_model_at_end brings back the best checkpoint, not the last."""
        model = subject.with_prefix()
        run = _trainer(subject, model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
        evaluate = run.evaluate
        # The first evaluation is made the best, whatever the loss does.
        run.evaluate = lambda *args, **options: {**evaluate(*args, **options), "eval_loss": run.state.global_step}
        _train(run)
        best, last = (tensors_of(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, STEPS))
        found = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert found.keys() == best.keys()
        assert all(torch.equal(value, best[name]) for name, value in found.items())
        assert not all(torch.equal(value, last[name]) for name, value in found.items()), "best and last are the same"
        assert "missing keys" not in caplog.text


def _resume(subject: Subject, folder: Path, *, checkpointing: bool = False, **options: Any) -> PreTrainedModel:
    """An uninterrupted run, and one that goes on from its first checkpoint with a new model."""
    whole, resumed = subject.with_prefix(**options), subject.with_prefix(strong=False, **options)
    start = copy.deepcopy([value for value in whole.parameters() if value.requires_grad])
    _train(_trainer(subject, whole, folder, checkpointing=checkpointing))
    trained = [value for value in whole.parameters() if value.requires_grad]
    assert all(not torch.equal(one, other) for one, other in zip(start, trained, strict=True)), "nothing was trained"
    run = _trainer(subject, resumed, folder, checkpointing=checkpointing)
    _train(run, resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert run.state.global_step == STEPS
    _assert_same_prefix(resumed, whole)
    return whole


def _assert_same_prefix(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    others = dict(found.named_parameters())
    for name, value in expected.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(others[name], value, atol=1e-5, rtol=1e-5)


def _train(run: Any, **options: Any) -> None:
    """``run.train()``. It collects garbage, which takes most of its time where many objects are old."""
    gc.freeze()
    try:
        run.train(**options)
    finally:
        gc.unfreeze()


def _trainer(
    subject: Subject, model: PreTrainedModel, folder: Path, *, checkpointing: bool = False, **changes: Any
) -> Any:
    """An untouched Trainer that saves after every step."""
    from transformers import Trainer, TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    # The name that this version of transformers has for it.
    switch = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "label_names": ["labels"],
        "report_to": [],
        "use_cpu": subject.device.type == "cpu",
        "disable_tqdm": True,
        "logging_strategy": "no",
        switch: checkpointing,
        f"{switch}_kwargs": checkpointing_kwargs(),
        **changes,
    }
    rows = _rows(subject, model)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows,
        eval_dataset=rows[:2],
        compute_loss_func=None if _takes_labels(model) else _loss_of_a_body,
    )


def checkpointing_kwargs() -> dict[str, Any] | None:
    """Before 5.0 transformers checkpoints the reentrant way if nothing is said."""
    return {"use_reentrant": False} if Version(transformers.__version__) < Version("5.0") else None


def _rows(subject: Subject, model: PreTrainedModel) -> Any:
    """Texts of 6 tokens, whose labels are themselves, or for a tagger their remainder."""
    kinds = subject.outputs(model, **subject.inputs(batch=1)).shape[-1] if _takes_labels(model) else subject.vocabulary
    return [{"input_ids": row, "labels": row % kinds} for row in subject.tokens(8, 6).cpu()]


def _takes_labels(model: PreTrainedModel) -> bool:
    from inspect import signature

    return "labels" in signature(model.forward).parameters


def _loss_of_a_body(outputs: Any, _labels: torch.Tensor, **_options: Any) -> torch.Tensor:
    """A bare body has no loss of its own."""
    return loss_of(numbers_of(outputs))
