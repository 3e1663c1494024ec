"""``prefixkit convert``: from any format that ``load`` reads to one of those that can be written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit.checkpoint import load, save
from prefixkit.cli.bases import base_config, with_weights, without_weights
from prefixkit.cli.output import check_file, check_folder, check_own_folder, refuse_source
from prefixkit.cli.saved import base_of, head_hint, saved_prefix, task_of
from prefixkit.cli.wrong import CommandError
from prefixkit.exporting import export
from prefixkit.formats.peft_export import head_of_the_base
from prefixkit.lifecycle import config, fold
from prefixkit.method import EMBEDDINGS
from prefixkit.prefixes import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(options: argparse.Namespace) -> None:
    """Load, write, and say what came of it."""
    _check_target(options)
    source = saved_prefix(options.source, options.revision)
    model = _with_prefix(source, options)
    if options.fold:
        fold(model)
    if options.to == "kv":
        export(model, options.target, positions=options.positions)
    else:
        save(model, options.target, format=options.to)
    what = config(model)
    print(f"{what.method}, {what.num_virtual_tokens} virtual tokens for {what.model_type}: {_written(options.target)}")


def _written(target: Path) -> str:
    files = [target] if target.is_file() else sorted(target.iterdir())
    size = sum(file.stat().st_size for file in files)
    return f"wrote {', '.join(map(str, files))} ({size / 1000:,.1f} kB)"


def _check_target(options: argparse.Namespace) -> None:
    if options.positions is not None and options.to != "kv":
        raise CommandError(f"--positions goes with --to kv; --to {options.to} keeps the policy of the prefix")
    if options.fold and options.to != "prefixkit":
        raise CommandError(f"--fold goes with --to prefixkit; --to {options.to} folds by itself")
    refuse_source(options.target, Path(options.source), "the prefix")
    check = {"kv": check_file, "peft": check_folder, "prefixkit": check_own_folder}[options.to]
    check(options.target, "DST", overwrite=options.overwrite)


def _with_prefix(source: Path, options: argparse.Namespace) -> PreTrainedModel:
    """A model with the prefix: without weights, but where the base has to read the prefix."""
    base, task = base_of(source, options.base), task_of(source, options.task)
    settings = base_config(base, num_labels=options.num_labels)
    model = without_weights(settings, task)
    with head_hint("pass the --task that the prefix was trained for, and with a classifier its --num-labels"):
        load(model, source)
    attachment = require(model).attachment
    reads = attachment.gives == EMBEDDINGS and (options.to != "prefixkit" or options.fold)
    of_the_base = head_of_the_base(model, attachment) if options.to == "peft" else []
    if reads or of_the_base:
        return load(with_weights(base, settings, task, needed=of_the_base), source)
    return model
