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
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import prefixkit

HERE = Path(__file__).parent

FULL_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Example:
    """A source, and every reference the data has for it."""

    source: str
    references: tuple[str, ...]


def read(path: Path, source_field: str, target_field: str) -> list[tuple[str, str]]:
    """Pairs of source and target from a JSON-lines file, plain or gzip-compressed."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
    return [(row[source_field], row[target_field]) for row in rows]


def group(pairs: list[tuple[str, str]]) -> list[Example]:
    """One example per distinct source."""
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    return [Example(source, tuple(targets)) for source, targets in references.items()]


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer ready to pad."""
    config = AutoConfig.from_pretrained(name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not config.is_encoder_decoder:
        tokenizer.padding_side = "left"
    return kind.from_pretrained(name, dtype=torch.float32), tokenizer


def encode(pair: tuple[str, str], tokenizer: PreTrainedTokenizerBase, seq2seq: bool) -> dict[str, list[int]]:
    """Token ids with labels; a decoder-only model reads source and target as one text."""
    source, target = pair
    if seq2seq:
        labels = tokenizer(text_target=target)["input_ids"]
        return {"input_ids": tokenizer(source)["input_ids"], "labels": labels}
    prompt = tokenizer(source + "\n", add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: list[str], title: str) -> list[str]:
    """The model's sentence for each source, by greedy search."""
    model.eval()
    seq2seq = model.config.is_encoder_decoder
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    sentences: dict[int, str] = {}
    for rows in tqdm(list(batches(order, 64)), desc=title, unit="batch"):
        prompts = [sources[row] if seq2seq else sources[row] + "\n" for row in rows]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=seq2seq).to(model.device)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = tokens if seq2seq else tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        sentences |= {row: text.split("\n")[0].strip() for row, text in zip(rows, texts, strict=True)}
    return [sentences[index] for index in range(len(sources))]


def bleu(sentences: list[str], examples: list[Example]) -> float:
    """Corpus BLEU against all references of each example."""
    most = max(len(example.references) for example in examples)
    columns = [
        [example.references[index] if index < len(example.references) else None for example in examples]
        for index in range(most)
    ]
    return float(sacrebleu.corpus_bleu(sentences, columns, tokenize="none", force=True).score)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    arguments: argparse.Namespace,
    learning_rate: float | None = None,
) -> None:
    """Train whatever of ``model`` is trainable, with an untouched Trainer.

    A flat prefix wants a far higher learning rate than an MLP or the model's own weights; prefixkit knows which.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        learning_rate = learning_rate or FULL_LEARNING_RATE
    else:
        learning_rate = learning_rate or prefixkit.recommended_lr(prefixkit.config(model))
        prefixkit.check_lr(prefixkit.config(model), learning_rate)
    seq2seq = model.config.is_encoder_decoder
    settings = TrainingArguments(
        output_dir=str(arguments.output / "run"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=arguments.seed,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=[encode(pair, tokenizer, seq2seq) for pair in pairs],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()


def prepare(model: PreTrainedModel, method: str, arguments: argparse.Namespace) -> PreTrainedModel:
    """Give the model a prefix, or leave all of it trainable for ``full``."""
    if method == "full":
        return model
    return prefixkit.apply(model, method=method, num_virtual_tokens=arguments.num_virtual_tokens)


def trainable(model: PreTrainedModel) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


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
