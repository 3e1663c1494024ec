"""Tune a prefix that turns a table into a sentence, and show what it is worth.

    python examples/table_to_text.py

trains a p-tuning v2 prefix for the small GPT-2 beside this file on a sample of E2E NLG, prints
BLEU on the test split before and after, three sentences with a reference each, saves the prefix,
loads it onto a fresh model and checks that this generates the same. Any other model and any
JSON-lines file do as well:

    python examples/table_to_text.py --model t5-small --train my.jsonl --test my-test.jsonl \
        --source-field question --target-field answer

With ``--compare`` it prints prefix tuning, p-tuning v2 and full fine-tuning side by side.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import prefixkit
from prefixkit.text_to_text import (
    Example,
    TrainSettings,
    batches,
    bleu,
    encode,
    generate,
    group,
    load_base,
    read,
    train as train_pairs,
    trainable,
)

__all__ = ["batches", "bleu", "encode", "generate", "group", "load_base", "read"]  # what the studies take from here

HERE = Path(__file__).parent


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    arguments: argparse.Namespace,
    learning_rate: float | None = None,
) -> None:
    settings = TrainSettings(
        output=arguments.output / "run",
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=learning_rate,
        seed=arguments.seed,
    )
    train_pairs(model, tokenizer, pairs, settings)


def prepare(model: PreTrainedModel, method: str, arguments: argparse.Namespace) -> PreTrainedModel:
    """Give the model a prefix, or leave all of it trainable for ``full``."""
    if method == "full":
        return model
    return prefixkit.apply(model, method=method, num_virtual_tokens=arguments.num_virtual_tokens)


def main_job(arguments: argparse.Namespace, pairs: list[tuple[str, str]], tests: list[Example]) -> None:
    """Train, score, show, save, reload, compare."""
    sources = [example.source for example in tests]
    model, tokenizer = load_base(arguments.model)
    before = bleu(generate(model, tokenizer, sources, "base"), tests)
    prepare(model, arguments.method, arguments)
    share = 100 * trainable(model) / model.num_parameters()
    print(f"{arguments.method}: {trainable(model):,} trainable numbers, {share:.2f} % of the model")
    train(model, tokenizer, pairs, arguments, arguments.learning_rate)
    sentences = generate(model, tokenizer, sources, "tuned")
    after = bleu(sentences, tests)

    print(f"\nBLEU on {len(tests)} test inputs: {before:.1f} before, {after:.1f} after")
    for index in (0, len(tests) // 2, len(tests) - 1):
        print(f"\n  table      {sources[index]}")
        print(f"  generated  {sentences[index]}")
        print(f"  reference  {tests[index].references[0]}")

    folder = arguments.output / "prefix"
    prefixkit.save(model, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    fresh, _ = load_base(arguments.model)
    prefixkit.load(fresh, folder)
    again = generate(fresh, tokenizer, sources[:64], "reloaded")
    verdict = "the same" if again == sentences[:64] else "NOT the same"
    print(f"\nsaved {size / 1000:.0f} kB to {folder}; reloaded into a fresh model, it generates {verdict} sentences")
    if again != sentences[:64]:
        raise SystemExit(1)


def compare(arguments: argparse.Namespace, pairs: list[tuple[str, str]], tests: list[Example]) -> None:
    """Prefix tuning, p-tuning v2 and full fine-tuning of the same model, same data, same epochs."""
    sources = [example.source for example in tests]
    rows = [("base", 0, 0.0, bleu(generate(*load_base(arguments.model), sources, "base"), tests))]
    for method in ("p-tuning-v2", "prefix-tuning", "full"):
        set_seed(arguments.seed)
        model, tokenizer = load_base(arguments.model)
        prepare(model, method, arguments)
        start = time.perf_counter()
        train(model, tokenizer, pairs, arguments)
        seconds = time.perf_counter() - start
        rows.append((method, trainable(model), seconds, bleu(generate(model, tokenizer, sources, method), tests)))
    full = rows[-1][3]
    print(f"\n{'method':<15}{'trainable':>12}{'seconds':>9}{'BLEU':>7}{'of full':>9}")
    for method, numbers, seconds, score in rows:
        print(f"{method:<15}{numbers:>12,}{seconds:>9.0f}{score:>7.1f}{score / full:>8.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "gpt2-e2e-base"), help="name or path of a model")
    parser.add_argument("--train", type=Path, default=HERE / "data/e2e/train.jsonl.gz", help="JSON-lines file")
    parser.add_argument("--test", type=Path, default=HERE / "data/e2e/test.jsonl.gz", help="JSON-lines file")
    parser.add_argument("--source-field", default="mr")
    parser.add_argument("--target-field", default="ref")
    parser.add_argument("--method", default="p-tuning-v2", choices=["p-tuning-v2", "prefix-tuning"])
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: by method")
    parser.add_argument("--max-train", type=int, help="use only so many training pairs")
    parser.add_argument("--max-test", type=int, help="use only so many test inputs")
    parser.add_argument("--output", type=Path, default=Path("runs/table-to-text"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="compare with full fine-tuning")
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    fields = arguments.source_field, arguments.target_field
    pairs = read(arguments.train, *fields)[: arguments.max_train]
    tests = group(read(arguments.test, *fields))[: arguments.max_test]
    (compare if arguments.compare else main_job)(arguments, pairs, tests)


if __name__ == "__main__":
    main()
