"""What numbers a prefix starts with.

The words are those of the ``init=`` of :func:`prefixkit.apply`. All but ``"random"`` come down to a flat
prefix, which every method can start from: see :func:`start_from`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from transformers.cache_utils import Cache

from prefixkit import placement
from prefixkit.errors import ConfigError, EngineError, closest
from prefixkit.frozen import keep_frozen
from prefixkit.head import input_embeddings
from prefixkit.method import EMBEDDINGS, MEMORY
from prefixkit.reading import join, of_cache, read
from prefixkit.tensor_parallel import from_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

logger: logging.Logger = logging.getLogger(__name__)

WORDS: Final = ("auto", "tokens", "matched", "zeros", "random")
SAMPLED = 64
"""Tokens that the spread of a model's keys and values is taken from."""
FIT_STEPS = 800
FIT_RATE = 0.02
FIT_CLOSE = 0.05
"""Relative error up to which a fitted prefix passes for the one that was asked for."""

Ids = torch.Tensor | Sequence[int]


@dataclass(frozen=True)
class TextInit:
    """Start from the keys and values of a text: ``init=prefixkit.TextInit(ids)``.

    The base reads the first P tokens of it once. A prefix of a decoder is then, under ``positions="shift"``,
    exactly that prompt; an encoder's is one whose tokens see each other and not the text behind them. What
    recurrent layers and convolutions hand from token to token is no key or value, and is left out.

    Attributes:
        input_ids: Token ids, ``(tokens,)`` or ``(1, tokens)``; P of them or more.
        decoder_input_ids: The same for the decoder of an encoder-decoder model, which reads ``input_ids``
            there too if this is left out.
    """

    input_ids: Ids
    decoder_input_ids: Ids | None = None


@dataclass(frozen=True)
class ChunksInit:
    """Start from the keys and values of several pieces of a long text, which the base reads as one.

    Attributes:
        input_ids: Token ids of a text, a document or a data set, ``(tokens,)`` or ``(1, tokens)``.
        chunk_length: Tokens of a piece. Pieces are taken from places that torch's random numbers choose, in the
            order of the text, until there are P tokens.
    """

    input_ids: Ids
    chunk_length: int = 32

    def sample(self, tokens: int) -> torch.Tensor:
        """``tokens`` token ids.

        Raises:
            ConfigError: If a piece has no length, or there are fewer tokens than asked for.
        """
        if type(self.chunk_length) is not int or self.chunk_length < 1:
            raise ConfigError(f"chunk_length is {self.chunk_length!r}; it must be a whole number of 1 or more")
        wanted = -(-tokens // self.chunk_length)
        ids = _row(self.input_ids, "input_ids", wanted * self.chunk_length)
        chunks = ids.unfold(0, self.chunk_length, self.chunk_length)
        chosen = torch.randperm(len(chunks))[:wanted].sort().values
        return chunks[chosen].flatten()[:tokens]


Init = str | torch.Tensor | Cache | TextInit | ChunksInit


def initialise(model: PreTrainedModel, attachment: Attachment, init: Init) -> None:
    """Give the prefix of an attachment, not yet on ``model``, its first numbers.

    Where tensor parallel has spread the model, all its processes have to call, and get those of the first.

    Raises:
        ConfigError: If ``init`` is none of the possible values, has another shape, or cannot be read.
    """
    if attachment.gives == MEMORY and init not in {"auto", "zeros", "random"}:
        raise ConfigError("a memory starts empty, at the base model; leave init= out")
    flat = None if attachment.gives == MEMORY else _wanted(model, attachment, init)
    if flat is not None:
        start_from(attachment.encoder, flat)
    with torch.no_grad():
        from_first(model, *attachment.encoder.parameters(), *attachment.encoder.buffers())
    if attachment.config.num_frozen_tokens:
        keep_frozen(attachment.encoder)


def start_from(encoder: nn.Module, flat: torch.Tensor) -> None:
    """Have a prefix encoder give ``flat``.

    One that has a method ``start(flat)`` does it itself. Any other is fitted: its parameters go down the
    squared error, relative to the spread of each column, in a few hundred steps.

    Args:
        encoder: The prefix encoder.
        flat: ``(P, width)``, float32, on its device.
    """
    start = getattr(encoder, "start", None)
    if start is not None:
        with torch.no_grad():
            start(flat)
    else:
        _fit(encoder, flat)
    with torch.no_grad():
        error = float((encoder() - flat).norm() / flat.norm().clamp(min=1e-8))
    if error > FIT_CLOSE:
        logger.warning("the prefix starts near what init= asks for and not at it: relative error %.2f", error)


def _fit(encoder: nn.Module, flat: torch.Tensor) -> None:
    scale = flat.std(dim=0).clamp(min=1e-3) if len(flat) > 1 else flat.abs().clamp(min=1e-3)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            ((encoder() - flat) / scale).square().mean().backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()


def _wanted(model: PreTrainedModel, attachment: Attachment, init: Init) -> torch.Tensor | None:
    """The flat prefix to start from; ``None``: as the method starts by itself."""
    config = attachment.config
    if isinstance(init, str):
        return _of_word(model, attachment, init)
    if isinstance(init, torch.Tensor):
        expected = _shape(attachment)
        if tuple(init.shape) != expected or not init.is_floating_point():
            what = "embeddings are" if attachment.gives == EMBEDDINGS else "flat prefix of this model is"
            raise ConfigError(
                f"init is {tuple(init.shape)} of {init.dtype}; the {what} {expected} of floating "
                "numbers (token ids go into prefixkit.TextInit)"
            )
        return init.to(_device(attachment), torch.float32)
    if isinstance(init, Cache) and attachment.gives == EMBEDDINGS:
        raise ConfigError("a cache holds no embeddings to start from; pass a text, or use method='p-tuning-v2'")
    if isinstance(init, Cache):
        return _of_length(join(attachment, of_cache(init, attachment)), attachment)
    if isinstance(init, TextInit):
        return _of_text(model, attachment, init)
    if isinstance(init, ChunksInit):
        return _of_ids(model, attachment, init.sample(config.num_virtual_tokens))
    raise ConfigError(f"init is a {type(init).__name__}; possible: {_possible()}")


def _of_length(flat: torch.Tensor, attachment: Attachment) -> torch.Tensor:
    tokens = attachment.config.num_virtual_tokens
    if len(flat) != tokens:
        raise ConfigError(f"the cache holds {len(flat)} tokens, and the prefix num_virtual_tokens={tokens}")
    return flat


def _shape(attachment: Attachment) -> tuple[int, ...]:
    """Of what the method's encoder gives."""
    with torch.no_grad():
        return tuple(attachment.encoder().shape)


def _possible() -> str:
    words = ", ".join(repr(word) for word in WORDS)
    return f"{words}, a tensor with the flat prefix, a transformers cache, prefixkit.TextInit, prefixkit.ChunksInit"


def _of_word(model: PreTrainedModel, attachment: Attachment, word: str) -> torch.Tensor | None:
    tokens = attachment.config.num_virtual_tokens
    if word == "auto":
        return _automatic(model, attachment)
    if word == "random":
        return None
    if word == "zeros":
        return torch.zeros(_shape(attachment), device=_device(attachment))
    if word == "tokens":
        return _of_ids(model, attachment, random_ids(model, tokens))
    if word == "matched":
        return _matched(model, attachment)
    raise ConfigError(f"init is {word!r}{closest(word, WORDS)}; possible: {_possible()}")


def _automatic(model: PreTrainedModel, attachment: Attachment) -> torch.Tensor | None:
    """Random tokens, where the model reads any and the method can start from what is wanted."""
    if not hasattr(attachment.encoder, "start") or not _reads_tokens(model):
        return None
    try:
        return _of_ids(model, attachment, random_ids(model, attachment.config.num_virtual_tokens))
    except (ConfigError, EngineError) as error:
        logger.warning("the prefix starts from small random numbers, not from those of random tokens: %s", error)
        return None


def _matched(model: PreTrainedModel, attachment: Attachment) -> torch.Tensor:
    """Random numbers with the mean and the spread that each number has in the model's own keys and values."""
    own = _of_ids(model, attachment, random_ids(model, SAMPLED))
    noise = torch.randn(attachment.config.num_virtual_tokens, own.shape[1], device=own.device)
    return own.mean(dim=0) + own.std(dim=0) * noise


def _of_text(model: PreTrainedModel, attachment: Attachment, text: TextInit) -> torch.Tensor:
    tokens = attachment.config.num_virtual_tokens
    target = text.input_ids if text.decoder_input_ids is None else text.decoder_input_ids
    ids = _row(text.input_ids, "input_ids", tokens)[:tokens]
    return _read(model, attachment, ids, _row(target, "decoder_input_ids", tokens)[:tokens])


def _of_ids(model: PreTrainedModel, attachment: Attachment, ids: torch.Tensor) -> torch.Tensor:
    """Keys and values of ``ids (tokens,)``, in parts if the model has not so many positions."""
    limits = [getattr(stack.positions, "limit", None) for stack in attachment.stacks]
    longest = min((limit for limit in limits if limit), default=len(ids))
    return torch.cat([_read(model, attachment, part, part) for part in ids.split(longest)])


def _read(model: PreTrainedModel, attachment: Attachment, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    device = placement.real_device(model)
    ids, target = (part.to(device, copy=True) for part in (ids, target))
    from_first(model, ids, target)  # processes that read together read the same
    if attachment.gives == EMBEDDINGS:
        return _embedded(model, ids).to(_device(attachment), torch.float32)
    inputs: dict[str, Any] = {"input_ids": ids[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = target[None]
    return read(model, attachment, inputs, len(ids))


def _embedded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    try:
        with torch.no_grad():
            embeddings: torch.Tensor = model.get_input_embeddings()(ids)
    except (IndexError, RuntimeError) as error:
        raise ConfigError(f"these token ids are not among this {type(model).__name__}'s: {error}") from error
    return embeddings


def random_ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Token ids ``(tokens,)`` of ordinary tokens, from torch's random numbers."""
    config = model.config.get_text_config()
    rows = getattr(input_embeddings(model), "num_embeddings", None)
    sizes = [size for size in (getattr(config, "vocab_size", None), rows) if isinstance(size, int)]
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    special = {one for value in named for one in (value if isinstance(value, list) else [value])}
    if not sizes:
        raise ConfigError(f"this {type(model).__name__} reads no tokens; pass init='random', or a flat prefix")
    ordinary = torch.tensor([token for token in range(min(sizes)) if token not in special])
    return ordinary[torch.randint(len(ordinary), (tokens,))]


def _reads_tokens(model: PreTrainedModel) -> bool:
    """Whether the model reads text, and its weights are there."""
    return model.main_input_name == "input_ids" and not all(weight.is_meta for weight in model.parameters())


def _row(ids: Ids, name: str, tokens: int) -> torch.Tensor:
    """``ids`` as ``(tokens or more,)``.

    Raises:
        ConfigError: If they are no token ids of one row, or too few.
    """
    row = torch.as_tensor(ids)
    if row.ndim == 2 and len(row) == 1:
        row = row[0]
    if row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
        raise ConfigError(f"{name} is {tuple(row.shape)} of {row.dtype}; pass token ids, (tokens,) or (1, tokens)")
    if len(row) < tokens:
        raise ConfigError(f"{name} has {len(row)} tokens, and the prefix needs {tokens}; pass more, or a shorter one")
    return row.long()


def _device(attachment: Attachment) -> torch.device:
    return next(attachment.encoder.parameters()).device
