"""``prefixkit generate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from prefixkit.cli.output import check_file, is_stream, refuse_source
from prefixkit.cli.saved import saved_prefix
from prefixkit.cli.with_prefix import to_generate
from prefixkit.cli.wrong import CommandError
from prefixkit.text_to_text import Example, bleu, generate, group, read, scorer, texts


def run(options: argparse.Namespace) -> None:
    """Generate, and print or write it."""
    examples = _examples(options)
    _check_output(options)
    model, tokenizer = to_generate(saved_prefix(options.prefix, options.revision), options)
    sources = [example.source for example in examples]
    sentences = generate(
        model,
        tokenizer,
        sources,
        "generate",
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    _write(sources, sentences, options)
    if options.score:
        print(f"BLEU on {len(examples)} inputs: {bleu(sentences, examples):.1f}")


def _examples(options: argparse.Namespace) -> list[Example]:
    if bool(options.texts) == (options.input is not None):
        raise CommandError("pass either texts or --input with a file of JSON lines")
    if options.score:
        if options.input is None:
            raise CommandError("--score needs --input, a file that has references")
        scorer()  # before the work, not after it
        return group(read(options.input, options.source_field, options.target_field))
    sources = options.texts or texts(options.input, options.source_field)
    return [Example(source, ()) for source in sources]


def _check_output(options: argparse.Namespace) -> None:
    if options.output is None or is_stream(options.output):
        return
    refuse_source(options.output, Path(options.prefix), "the prefix")
    if options.input is not None:
        refuse_source(options.output, options.input, "--input")
    check_file(options.output, "--output", overwrite=options.overwrite)


def _write(sources: Sequence[str], sentences: Sequence[str], options: argparse.Namespace) -> None:
    if options.output is None:
        print("\n".join(sentences))
        return
    fields = options.source_field, options.target_field
    rows = [dict(zip(fields, pair, strict=True)) for pair in zip(sources, sentences, strict=True)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.output.write_text(content, encoding="utf-8")
    print(f"wrote {len(rows)} lines to {options.output}")
