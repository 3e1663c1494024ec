"""From a model with a prefix to a folder for vLLM; vLLM is not needed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit.checkpoint_files import replace_file
from prefixkit.errors import CheckpointError, ConfigError
from prefixkit.prefixes import require
from prefixkit.serving.placeholders import check_decoder_only, check_number, drawn
from prefixkit.serving.prefix_file import prefix_of, write_prefix
from prefixkit.serving.verdict import ends_of
from prefixkit_vllm.folder import DESCRIPTION, PREFIX, Description

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORD_TWICE = re.compile(r" ?([^\W\d_]{2,}) \1")


def write(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    placeholders: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write ``prefix.safetensors``, the prefix's keys and values, and ``vllm.json``, its placeholder ids.

    Example::

        prefixkit_vllm.write(model, "runs/e2e-vllm", tokenizer=tokenizer)

    Args:
        model: A decoder-only model with a prefix.
        folder: Where the files go; it is made if there is none.
        placeholders: The ids, P of them; by default words of the vocabulary drawn by the prefix's own numbers, so that
            two prefixes on one server are not taken for each other.
        tokenizer: The base's. Then only such words are drawn as are read back from their text, which
            :func:`prefixkit_vllm.chat_template` needs.

    Raises:
        AttachmentError: If the model has no prefix.
        CheckpointError: If ``folder`` is a file.
        ConfigError: If the placeholders are too few, too many or not in the vocabulary, or the tokenizer has no words
            to draw.
        EngineError: If keys and values in front of the text do not say it all.
    """
    folder, attachment = Path(folder), require(model).attachment
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot write to {str(folder)!r}: it is a file; name a folder")
    check_decoder_only(attachment, "vLLM")
    config = model.config.get_text_config()
    if placeholders is not None:
        check_number(placeholders, attachment.config.num_virtual_tokens)
        _check_vocabulary(placeholders, config.vocab_size)
    words = [] if placeholders is not None else _words(model, tokenizer)
    pieces = prefix_of(model)
    write_prefix(model, folder, pieces)
    if not attachment.writes(model):
        return
    description = Description(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        placeholders=tuple(placeholders if placeholders is not None else drawn(words, pieces)),
        eos_token_ids=ends_of(model),
        sha256=hashlib.sha256((folder / PREFIX).read_bytes()).hexdigest(),
    )
    replace_file(folder / DESCRIPTION, description.as_json())


def _check_vocabulary(placeholders: Sequence[int], size: int) -> None:
    outside = [token for token in placeholders if not 0 <= token < size]
    if outside:
        raise ConfigError(f"the placeholders {outside} are not in the vocabulary, whose ids are 0 to {size - 1}")


def _words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The ids to draw from: none that a text begins, ends or is padded with."""
    config = model.config.get_text_config()
    settings = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    special = {token for setting in settings for token in (setting if isinstance(setting, list) else [setting])}
    ids = [token for token in range(config.vocab_size) if token not in special]
    return ids if tokenizer is None else _read_back(tokenizer, ids)


def _read_back(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Those that are whole words, which a tokenizer reads back from their text whatever words stand beside them."""
    ids = [token for token in ids if token < len(tokenizer)]
    texts = tokenizer.batch_decode([[token, token] for token in ids], clean_up_tokenization_spaces=False)
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    words = [
        token
        for token, text, read in zip(ids, texts, found, strict=True)
        if list(read) == [token, token] and WORD_TWICE.fullmatch(text)
    ]
    if not words:
        raise ConfigError(
            "this tokenizer has no token that is a word of letters, between spaces; leave tokenizer= out, or pass "
            "placeholders="
        )
    return words
