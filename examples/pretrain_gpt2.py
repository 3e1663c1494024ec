"""Pretrain the small GPT-2 of the table-to-text example, from plain sentences.

    python examples/pretrain_gpt2.py --data DIR

``DIR`` holds ``e2e/train.jsonl.gz`` (``mr``, ``ref``) and ``dart/{valid,test}.jsonl.gz``
(``triples``, ``refs``). The model reads three kinds of text, and never an E2E table beside
its sentence, which is what the prefix is to learn:

* a third of the E2E sentences on their own;
* the phrases of an E2E sentence in a random order, then the sentence (denoising, which
  teaches it to copy from its context);
* DART triples, then their sentence, without the triples that DART took from E2E.

It takes ten to twenty minutes on two cores and writes tokenizer and float16 weights to
``examples/gpt2-e2e-base``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

OUTPUT = Path(__file__).parent / "gpt2-e2e-base"
END = "<|endoftext|>"
BLOCK = 128
E2E_PREDICATES = {"eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near"}


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def phrases(sentence: str, rng: random.Random) -> str:
    """Cut ``sentence`` into phrases of one to four words, drop a third, shuffle the rest."""
    words = sentence.split()
    cuts: list[str] = []
    while words:
        size = rng.randint(1, 4)
        cuts.append(" ".join(words[:size]))
        words = words[size:]
    kept = [cut for cut in cuts if rng.random() > 1 / 3] or cuts
    rng.shuffle(kept)
    return " / ".join(kept)


def dart_documents(data: Path) -> Iterator[str]:
    for split in ("valid", "test"):
        for row in read(data / "dart" / f"{split}.jsonl.gz"):
            if any(predicate in E2E_PREDICATES for _, predicate, _ in row["triples"]):
                continue
            table = " | ".join(" : ".join(triple) for triple in row["triples"])
            for reference in row["refs"]:
                yield f"{table}\n{reference}"


def documents(data: Path, rng: random.Random) -> list[str]:
    sentences = [row["ref"] for row in read(data / "e2e" / "train.jsonl.gz")]
    texts = sentences[::3]
    texts += [f"{phrases(sentence, rng)}\n{sentence}" for sentence in sentences]
    texts += dart_documents(data)
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="left"
    )


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """Token ids of all texts in one stream, cut into blocks of ``BLOCK``."""
    stream = [token for ids in tokenizer([END + text for text in texts])["input_ids"] for token in ids]
    whole = torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)
    return [{"input_ids": row, "labels": row} for row in whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of e2e/ and dart/")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--epochs", type=float, default=3.0)
    arguments = parser.parse_args()

    set_seed(0)
    texts = documents(arguments.data, random.Random(0))
    tokenizer = train_tokenizer(texts)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=192,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output / "run"),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            logging_steps=100,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=True,
        ),
        train_dataset=blocks(texts, tokenizer),
    )
    trainer.train()
    model.config.use_cache = True  # Trainer switches it off, and would have it saved so
    model.half().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
