"""``prefixkit export``: a prefix for a program that serves it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.cli.bases import tokenizer_of
from prefixkit.cli.output import check_file, check_folder, refuse_source
from prefixkit.cli.saved import base_of, saved_prefix
from prefixkit.cli.with_prefix import reads_with_the_base, report, stamps, with_base_weights, without_base_weights
from prefixkit.cli.wrong import CommandError
from prefixkit.serving.targets import TARGETS, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(options: argparse.Namespace) -> None:
    """Load, write, and say what came of it."""
    target = TARGETS[options.to]
    settings = chosen(options, options.to, target.options)
    if "gguf" in target.options and options.gguf is None:
        raise CommandError(f"{options.to} needs --gguf, the file of the base that it runs")
    refuse_source(options.target, Path(options.source), "the prefix")
    check = check_folder if target.mark else check_file
    check(options.target, "DST", overwrite=options.overwrite)
    serving = target.serving()
    source = saved_prefix(options.source, options.revision)
    refuse_source(options.target, Path(base_of(source, options.base)), "the base")
    model = _with_prefix(source, options, target)
    if "tokenizer" in target.of_the_base:
        settings["tokenizer"] = tokenizer_of(base_of(source, options.base))
    before = stamps(options.target)
    serving.write(model, options.target, **settings)
    print(report(model, options.target, before))


def chosen(options: argparse.Namespace, name: str, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Those options of the command line that the target called ``name`` has.

    Raises:
        CommandError: If another target's is given.
    """
    every = {option for target in TARGETS.values() for option in (*target.options, *target.run_options)}
    given = {option for option in every & vars(options).keys() if getattr(options, option) not in (None, False)}
    for option in sorted(given.difference(wanted)):
        of = ", ".join(other for other, target in TARGETS.items() if option in (*target.options, *target.run_options))
        raise CommandError(f"--{option.replace('_', '-')} is for {of}, and this is for {name}")
    return {option: getattr(options, option) for option in sorted(given)}


def _with_prefix(source: Path, options: argparse.Namespace, target: Target) -> PreTrainedModel:
    if target.reads_weights:
        return with_base_weights(source, options)
    model = without_base_weights(source, options)
    return with_base_weights(source, options) if reads_with_the_base(model) else model
