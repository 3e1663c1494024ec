"""The arms: ways to train a model, each a function from the bare base to one that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedModel

import prefixkit
from benchmarks.studies.tasks import e2e

INITS = ("tokens", "matched", "zeros", "random")

Arm = Callable[[PreTrainedModel], Any]
"""Takes the base and returns the model to train; what requires a gradient afterwards is the arm's budget."""


def prefix(method: str = "p-tuning-v2", tokens: int = 20, **options: Any) -> Arm:
    """A prefix of ``tokens`` virtual tokens."""
    return lambda model: prefixkit.apply(model, method, num_virtual_tokens=tokens, **options)


def from_a_solved_table(model: PreTrainedModel) -> PreTrainedModel:
    """A prefix for the small GPT-2 that starts from tables with their sentences, and so from words of the task."""
    rows = [row for encoded in e2e().train[:4] for row in encoded["input_ids"]]
    return prefixkit.apply(model, "p-tuning-v2", num_virtual_tokens=20, init=prefixkit.TextInit(rows))


def full(model: PreTrainedModel) -> PreTrainedModel:
    """All weights."""
    return model


def probe(model: PreTrainedModel) -> PreTrainedModel:
    """The new head of a task class alone."""
    model.requires_grad_(False)
    model.get_submodule("classifier").requires_grad_(True)
    return model


def top_layers(count: int) -> Arm:
    """The last ``count`` layers of the small GPT-2, and its last norm."""

    def arm(model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        for layer in model.transformer.h[-count:]:
            layer.requires_grad_(True)
        model.transformer.ln_f.requires_grad_(True)
        return model

    return arm


def lora(rank: int, targets: list[str]) -> Arm:
    """PEFT's LoRA of ``rank`` on the modules ``targets``, with alpha = 2 × rank."""

    def arm(model: PreTrainedModel) -> Any:
        classifies = hasattr(model, "classifier")
        kind = TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM
        return get_peft_model(model, LoraConfig(task_type=kind, r=rank, lora_alpha=2 * rank, target_modules=targets))

    return arm


def budget(model: torch.nn.Module) -> int:
    """Numbers that train."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)
