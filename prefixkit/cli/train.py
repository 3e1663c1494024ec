"""``prefixkit train``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import set_seed

from prefixkit.checkpoint import save
from prefixkit.cli.bases import having
from prefixkit.cli.output import check_own_folder, refuse_source
from prefixkit.cli.wrong import CommandError
from prefixkit.discovery import installed
from prefixkit.lifecycle import apply
from prefixkit.text_to_text import (
    Example,
    TrainSettings,
    bleu,
    generate,
    group,
    load_base,
    read,
    scorer,
    train,
    trainable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 3


def run(options: argparse.Namespace) -> None:
    """Train, save, and score if there is something to score with."""
    refuse_source(options.output, Path(options.model), "the model")
    check_own_folder(options.output, "--output", overwrite=options.overwrite)
    fields = options.source_field, options.target_field
    pairs = read(options.train, *fields)[: options.max_train]
    tests = group(read(options.test, *fields))[: options.max_test] if options.test else []
    if tests:
        scorer()  # before the work, not after it
    installed().method(options.method)  # so that a wrong one is found here too
    set_seed(options.seed)
    model, tokenizer = having(options.model, lambda: load_base(options.model))
    before = _score(model, tokenizer, tests, "base")
    apply(model, options.method, num_virtual_tokens=options.num_virtual_tokens)
    numbers = trainable(model)
    print(
        f"{options.method}: {numbers:,} trainable numbers, {100 * numbers / model.num_parameters():.2f} % of the model"
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenizer, pairs, _settings(options, Path(folder)))
    _check_finite(model)
    save(model, options.output)
    print(f"saved the prefix to {options.output}")
    after = _score(model, tokenizer, tests, "tuned")
    if before and after:
        print(f"BLEU on {len(tests)} test inputs: {before[0]:.1f} before, {after[0]:.1f} after")
        for example, sentence in list(zip(tests, after[1], strict=True))[:SHOWN]:
            print(f"\n  source     {example.source}\n  generated  {sentence}\n  reference  {example.references[0]}")


def _check_finite(model: PreTrainedModel) -> None:
    if not all(torch.isfinite(value).all() for value in model.parameters() if value.requires_grad):
        raise CommandError(
            "training came to numbers that are not finite, so the prefix is not saved; pass a lower --learning-rate"
        )


def _settings(options: argparse.Namespace, folder: Path) -> TrainSettings:
    return TrainSettings(
        output=folder,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: list[Example], title: str
) -> tuple[float, list[str]] | None:
    """BLEU, and what it was counted on; ``None`` without tests."""
    if not tests:
        return None
    sentences = generate(model, tokenizer, [example.source for example in tests], title)
    return bleu(sentences, tests), sentences
