"""``prefixkit convert``: from any format that ``load`` reads to one that prefixkit or PEFT loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit.checkpoint import save
from prefixkit.cli.output import check_folder, check_own_folder, refuse_source
from prefixkit.cli.saved import saved_prefix
from prefixkit.cli.with_prefix import reads_with_the_base, report, stamps, with_base_weights, without_base_weights
from prefixkit.cli.wrong import CommandError
from prefixkit.formats.peft_export import head_of_the_base
from prefixkit.lifecycle import fold
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
    before = stamps(options.target)
    save(model, options.target, format=options.to)
    print(report(model, options.target, before))


def _check_target(options: argparse.Namespace) -> None:
    if options.fold and options.to != "prefixkit":
        raise CommandError(f"--fold goes with --to prefixkit; --to {options.to} folds by itself")
    refuse_source(options.target, Path(options.source), "the prefix")
    check = check_folder if options.to == "peft" else check_own_folder
    check(options.target, "DST", overwrite=options.overwrite)


def _with_prefix(source: Path, options: argparse.Namespace) -> PreTrainedModel:
    model = without_base_weights(source, options)
    attachment = require(model).attachment
    of_the_base = head_of_the_base(model, attachment) if options.to == "peft" else []
    if of_the_base or (reads_with_the_base(model) and (options.to != "prefixkit" or options.fold)):
        return with_base_weights(source, options, needed=of_the_base)
    return model
