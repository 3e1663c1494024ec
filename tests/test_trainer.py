"""An untouched Trainer: checkpoints without base weights, resume, best model, pipelines."""

from __future__ import annotations

import pytest
import safetensors.torch
import tiny
import torch
from transformers import GPT2ForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import prefixkit
from prefixkit.testing.with_trainer import checkpointing_kwargs

# Trainer's own habits, not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.steps


def rows(count=24):
    ids = tiny.tokens(count, 6)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, callbacks=(), **changes):
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=list(callbacks),
    )


def fresh(method):
    model = tiny.make("gpt2")
    torch.manual_seed(0)
    return prefixkit.apply(model, method=method, num_virtual_tokens=4)


def prefix_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
def test_resume_ends_where_an_uninterrupted_run_ends(method, checkpointing, tmp_path):
    options = {CHECKPOINTING: checkpointing, f"{CHECKPOINTING}_kwargs": checkpointing_kwargs()}
    whole = fresh(method)
    start = prefix_of(whole)
    trainer(whole, tmp_path / "whole", **options).train()
    assert any(not torch.equal(start[name], value) for name, value in prefix_of(whole).items())
    trainer(fresh(method), tmp_path / "parts", callbacks=[StopAfter(3)], **options).train()
    resumed = fresh(method)
    trainer(resumed, tmp_path / "parts", **options).train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-3"))
    for name, value in prefix_of(whole).items():
        torch.testing.assert_close(prefix_of(resumed)[name], value, atol=1e-6, rtol=0)


def test_checkpoints_hold_prefix_and_head_only(tmp_path):
    model = GPT2ForSequenceClassification(tiny.gpt2())
    prefixkit.apply(model, num_virtual_tokens=4)
    data = [{"input_ids": row, "labels": torch.tensor(1)} for row in tiny.tokens(8, 6)]
    run = trainer(model, tmp_path)
    run.train_dataset = data
    run.train()
    folder = tmp_path / "checkpoint-6"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert sorted(tensors) == ["prefixkit.default.embedding.weight", "score.weight"]
    other = GPT2ForSequenceClassification(tiny.gpt2())
    other.load_state_dict({name: value for name, value in model.state_dict().items() if "prefixkit" not in name})
    prefixkit.load(other.eval(), folder)
    ids = tiny.tokens(2, 6)
    assert torch.equal(tiny.logits(other, input_ids=ids), tiny.logits(model.eval(), input_ids=ids))


def test_best_model_at_end(tmp_path, caplog):
    model = fresh("p-tuning-v2")
    run = trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=3.0,
    )
    run.train()
    best = safetensors.torch.load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert torch.equal(model.prefixkit.default.embedding.weight, best["prefixkit.default.embedding.weight"])
    assert "missing keys" not in caplog.text


def test_save_pretrained_is_the_models_own_again_after_remove(tmp_path):
    model = fresh("p-tuning-v2")
    model.save_pretrained(tmp_path / "with")
    assert sorted(file.name for file in (tmp_path / "with").iterdir()) == [
        "model.safetensors",
        "prefix.safetensors",
        "prefix_config.json",
    ]
    prefixkit.remove(model)
    model.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(tiny.logits(again, **tiny.inputs(again)), tiny.logits(model, **tiny.inputs(model)))
