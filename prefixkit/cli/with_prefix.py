"""The model with the saved prefix that a command names, and what to say of what was written."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from prefixkit.checkpoint import load
from prefixkit.cli.bases import base_config, having, with_weights, without_weights
from prefixkit.cli.saved import base_of, head_hint, task_of
from prefixkit.lifecycle import config
from prefixkit.method import EMBEDDINGS
from prefixkit.prefixes import require

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HINT = "pass the --task that the prefix was trained for, and with a classifier its --num-labels"


def without_base_weights(source: Path, options: argparse.Namespace) -> PreTrainedModel:
    """The prefix on a model that its config alone makes."""
    base, task = base_of(source, options.base), task_of(source, options.task)
    with head_hint(HINT):
        return load(without_weights(base_config(base, num_labels=options.num_labels), task), source)


def with_base_weights(source: Path, options: argparse.Namespace, needed: Collection[str] = ()) -> PreTrainedModel:
    """The prefix on the base itself, in float32, whose weights have the parameters ``needed``."""
    base, task = base_of(source, options.base), task_of(source, options.task)
    settings = base_config(base, num_labels=options.num_labels)
    with head_hint(HINT):
        return load(with_weights(base, settings, task, needed=needed), source)


def to_generate(source: Path, options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The prefix on the base itself as a language model, and its tokenizer.

    Raises:
        CommandError: If the base cannot be had, or the prefix was trained with a head of another task.
    """
    from prefixkit.text_to_text import load_base  # brings Trainer, which the other commands do without

    base = base_of(source, options.base)
    model, tokenizer = having(base, lambda: load_base(base))
    with head_hint(f"{options.command} serves language models, and this prefix was trained for another task"):
        module: nn.Module = load(model, source)
    module.eval()
    return model, tokenizer


def reads_with_the_base(model: PreTrainedModel) -> bool:
    """Whether the prefix is what the base makes of it, as of prompt tuning's tokens."""
    return require(model).attachment.gives == EMBEDDINGS


def stamps(target: Path) -> dict[Path, int]:
    """The files of ``target``, or it itself, and when they were written."""
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def report(model: PreTrainedModel, target: Path, before: dict[Path, int]) -> str:
    """What was written to ``target`` since its files were those of ``before``."""
    what = config(model)
    files = [file for file, stamp in stamps(target).items() if before.get(file) != stamp]
    size = sum(file.stat().st_size for file in files)
    return (
        f"{what.method}, {what.num_virtual_tokens} virtual tokens for {what.model_type}: "
        f"wrote {', '.join(map(str, files))} ({size / 1000:,.1f} kB)"
    )
