"""From a source text to a target text: read pairs, train whatever of a model trains, generate, score.

The command line and ``examples/table_to_text.py`` are thin layers over this module.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from prefixkit.errors import DataError, UnsupportedModelError, closest
from prefixkit.json_object import json_object
from prefixkit.learning_rate import check_lr, recommended_lr
from prefixkit.lifecycle import config as config_of

Item = TypeVar("Item")
Pair = tuple[str, str]

FULL_LEARNING_RATE = 1e-3
"""Peak learning rate where all weights of a small model train."""


@dataclass(frozen=True)
class Example:
    """A source, and every reference the data has for it."""

    source: str
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train.

    Attributes:
        output: The folder in which ``Trainer`` works.
        epochs: How often all pairs are seen.
        batch_size: Pairs in a step.
        learning_rate: The peak; ``None``: what suits the method.
        seed: Of the order of the pairs.
    """

    output: Path
    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float | None = None
    seed: int = 0


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, plain or gzip-compressed.

    Raises:
        DataError: If there is no such file, it is damaged, or a line is no JSON object.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # a string may hold other line ends
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; it has to be a file of JSON lines") from error
    found = [
        json_object(line, f"line {number} of {str(path)!r}", DataError)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{str(path)!r} has no lines; each has to be a JSON object")
    return found


def texts(path: Path, field: str) -> list[str]:
    """One field of every object in a JSON-lines file.

    Raises:
        DataError: As :func:`rows`, and if an object lacks the field, or holds no text in it.
    """
    found: list[str] = []
    for number, row in enumerate(rows(path), 1):
        if not isinstance(row.get(field), str):
            raise DataError(
                f"object {number} of {str(path)!r} has no text in a field {field!r}{closest(field, row)}; "
                f"it has {', '.join(map(repr, row)) or 'no fields'}"
            )
        found.append(row[field])
    return found


def read(path: Path, source_field: str, target_field: str) -> list[Pair]:
    """Pairs of source and target from a JSON-lines file, plain or gzip-compressed.

    Raises:
        DataError: If there is no such file, it is damaged, or an object lacks one of the fields.
    """
    return list(zip(texts(path, source_field), texts(path, target_field), strict=True))


def group(pairs: Sequence[Pair]) -> list[Example]:
    """One example per distinct source."""
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    return [Example(source, tuple(targets)) for source, targets in references.items()]


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer ready to pad.

    Raises:
        UnsupportedModelError: If it is an encoder, or has no tokenizer that can be used.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    _check_writes(config, name)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    _check_tokenizer(tokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not config.is_encoder_decoder:
        tokenizer.padding_side = "left"
    return kind.from_pretrained(name, dtype=torch.float32, trust_remote_code=False), tokenizer


def _check_writes(config: PretrainedConfig, name: str) -> None:
    """Refuse an encoder, which transformers runs as a language model that sees the words it is to write."""
    encodes = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    if encodes and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{name!r} is an encoder ({config.model_type}), which writes no text; name a decoder or an encoder-decoder"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if len(words) < 2:  # what transformers makes up where there are no files; some have the space
        raise UnsupportedModelError(
            f"{name!r} has no tokenizer; write the base's own there, with tokenizer.save_pretrained"
        )
    if tokenizer.eos_token is None:
        raise UnsupportedModelError(
            f"the tokenizer of {name!r} has no eos_token, with which a text ends; give it one and save it there"
        )


def encode(pair: Pair, tokenizer: PreTrainedTokenizerBase, seq2seq: bool) -> dict[str, list[int]]:
    """Token ids with labels; a decoder-only model reads source and target as one text."""
    source, target = pair
    if seq2seq:
        labels = tokenizer(text_target=target)["input_ids"]
        return {"input_ids": tokenizer(source)["input_ids"], "labels": labels}
    prompt = prompt_of(source, tokenizer)
    answer = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def prompt_of(source: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a decoder-only model reads in front of what it writes."""
    found: list[int] = tokenizer(source + "\n", add_special_tokens=False)["input_ids"]
    return found


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Runs of ``size`` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    title: str,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The model's sentence for each source, by greedy search, with a progress bar called ``title``."""
    module: torch.nn.Module = model
    module.eval()
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    sentences: dict[int, str] = {}
    for part in tqdm(list(batches(order, batch_size)), desc=title, unit="batch"):
        written = _written(model, tokenizer, [sources[row] for row in part], max_new_tokens)
        sentences |= dict(zip(part, written, strict=True))
    return [sentences[index] for index in range(len(sources))]


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: list[str], max_new_tokens: int
) -> list[str]:
    seq2seq = model.config.is_encoder_decoder
    prompts = sources if seq2seq else [source + "\n" for source in sources]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=seq2seq).to(model.device)
    generate: Any = model.generate
    tokens = generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new = tokens if seq2seq else tokens[:, inputs["input_ids"].shape[1] :]
    return [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def scorer() -> Any:
    """The package that counts BLEU.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU is counted by sacrebleu, which is missing: pip install 'prefixkit[text]'") from error
    return sacrebleu


def bleu(sentences: Sequence[str], examples: Sequence[Example]) -> float:
    """Corpus BLEU against all references of each example.

    Raises:
        ImportError: If sacrebleu is not installed.
    """
    most = max(len(example.references) for example in examples)
    columns = [
        [example.references[index] if index < len(example.references) else None for example in examples]
        for index in range(most)
    ]
    return float(scorer().corpus_bleu(sentences, columns, tokenize="none", force=True).score)


def peak_rate(model: PreTrainedModel, learning_rate: float | None) -> float:
    """The learning rate that was asked for, or the one that suits what trains.

    A flat prefix wants a far higher one than an MLP or the model's own weights; prefixkit knows which.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return FULL_LEARNING_RATE if learning_rate is None else learning_rate
    rate = recommended_lr(config_of(model)) if learning_rate is None else learning_rate
    check_lr(config_of(model), rate)
    return rate


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], settings: TrainSettings
) -> None:
    """Train whatever of ``model`` is trainable, with an untouched Trainer.

    Raises:
        ImportError: If accelerate, which Trainer needs, is not installed.
    """
    seq2seq = model.config.is_encoder_decoder
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=peak_rate(model, settings.learning_rate),
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        dataloader_pin_memory=False,
    )
    encoded: Any = [encode(pair, tokenizer, seq2seq) for pair in pairs]
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    Trainer(model=model, args=arguments, train_dataset=encoded, data_collator=collate).train()


def trainable(model: PreTrainedModel) -> int:
    """How many numbers train."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)
