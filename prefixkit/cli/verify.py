"""``prefixkit verify``: whether a program says with a prefix what the model says with it."""

from __future__ import annotations

import argparse

from prefixkit.cli.export import chosen
from prefixkit.cli.saved import base_of, saved_prefix
from prefixkit.cli.with_prefix import to_generate
from prefixkit.serving.targets import TARGETS, written_for
from prefixkit.text_to_text import prompt_of


def run(options: argparse.Namespace) -> None:
    """Run all that was written for the program on each text, and say how far it is from the model."""
    name = written_for(options.target)
    target = TARGETS[name]
    settings = chosen(options, name, target.run_options)
    serving = target.serving()
    ways = serving.runs(options.target, **settings)
    source = saved_prefix(options.source, options.revision)
    model, tokenizer = to_generate(source, options)
    settings |= settings.pop("engine", {})
    if "base" in target.of_the_base:
        settings["base"] = base_of(source, options.base)
    for text in options.texts:
        prompt = prompt_of(text, tokenizer)
        for way in ways:
            print(serving.verify(model, options.target, prompt, options.max_new_tokens, **settings, **way))
