"""Programs that keep what a text has made: a prefix enters as the keys and values of a text of P placeholder tokens.

The ids are never looked at again, but by what keeps texts apart. So each prefix needs a text of its own.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

from prefixkit.cache_engine import check_cacheable, without_the_other
from prefixkit.errors import ConfigError, EngineError
from prefixkit.serving.prefix_file import check_head

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from prefixkit.attachment import Attachment


def drawn(words: Sequence[int], pieces: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """A word for each virtual token, drawn by the prefix's own numbers: other ones for another prefix.

    Args:
        words: The ids to draw from.
        pieces: Keys and values of each site, ``(..., P, dim)``, on any device.
    """
    digest, tokens = hashlib.sha256(), 0
    for part in (part for pair in pieces for part in pair):
        digest.update(part.detach().float().contiguous().cpu().numpy().tobytes())
        tokens = part.shape[-2]
    return random.Random(digest.hexdigest()).choices(words, k=tokens)  # noqa: S311  no secret


def check_number(placeholders: Sequence[int], tokens: int) -> None:
    """Refuse another number of placeholders than the prefix has virtual tokens."""
    if len(placeholders) != tokens:
        raise ConfigError(f"{len(placeholders)} placeholders were given, and the prefix has {tokens} virtual tokens")


def check_decoder_only(attachment: Attachment, program: str) -> None:
    """Refuse what the keys and values of a text in front do not say to a decoder-only ``program``.

    Raises:
        EngineError: For an encoder, a head, or what no native cache can hold.
    """
    stacks = sorted({site.stack for site in attachment.layout.sites} - {"decoder"})
    if stacks or len({stack.name for stack in attachment.stacks}) > 1:
        raise EngineError(
            f"{program} is given what a decoder-only model has read, and this model has "
            f"{', '.join(stacks) or 'an encoder'} as well"
        )
    check_head(attachment, program)
    try:
        check_cacheable(attachment)
    except EngineError as error:
        raise EngineError(f"{program} cannot hold this prefix: {without_the_other(error)}") from error
