"""Virtual tokens as input embeddings (prompt tuning), which the base turns into keys and values itself.

Lester et al. 2021 (arXiv 2104.08691); the embedding-only ablation of Li & Liang 2021, §7.2. In a decoder virtual
tokens see each other only, so their keys and values are the same for all rows: the base reads them once per
call, and what comes of it is a prefix like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.errors import EngineError, MethodError
from prefixkit.method import EMBEDDINGS
from prefixkit.prefix_state import PrefixState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefixkit.adapter import Stack
    from prefixkit.attachment import Attachment

_reading: ContextVar[tuple[str, PrefixState] | None] = ContextVar("prefixkit_reading", default=None)
"""The attachment whose stack is reading embeddings in this thread, and what takes its keys and values."""


def reading_now(attachment: Attachment) -> PrefixState | None:
    """What takes the keys and values while the stack of ``attachment`` reads its virtual tokens; else ``None``."""
    if attachment.gives != EMBEDDINGS:  # torch.compile knows no context variables
        return None
    reading = _reading.get()
    return reading[1] if reading is not None and reading[0] == attachment.identity else None


@contextmanager
def _reads(attachment: Attachment, state: PrefixState) -> Iterator[None]:
    token = _reading.set((attachment.identity, state))
    try:
        yield
    finally:
        _reading.reset(token)


def read_embeddings(module: nn.Module, attachment: Attachment, embeddings: torch.Tensor) -> torch.Tensor:
    """The flat prefix ``(P, width)`` that the stack makes of virtual tokens, with its gradient.

    Args:
        module: The stack, with the attachment on it.
        attachment: Whose virtual tokens they are.
        embeddings: ``(P, embedding_size)``.
    """
    state = PrefixState(pieces={}, num_virtual_tokens=0, query_positions=None, slide=False, dropout=0.0, read={})
    weight = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    if weight is None:
        raise EngineError(
            f"this {type(module).__name__} has no parameters of its own, as in a replica of nn.DataParallel, and "
            "cannot read embeddings there; use DistributedDataParallel, or fold the prefix"
        )
    device = embeddings.device if weight.is_meta else weight.device
    arguments: dict[str, Any] = {"inputs_embeds": embeddings[None].to(device, weight.dtype)}
    if internals.takes(module, "use_cache"):
        arguments["use_cache"] = False
    with _reads(attachment, state):
        module(**arguments)
    assert state.read is not None
    pieces = (state.read[site.place] for site in attachment.layout.sites)
    return attachment.layout.join([type(pair)(*(part.to(embeddings) for part in pair)) for pair in pieces])


def check_reads(stacks: Iterable[Stack]) -> None:
    """Raise where virtual tokens would see more than each other.

    Raises:
        MethodError: If the prefix goes anywhere but into one decoder.
    """
    kinds = sorted({site.stack for stack in stacks for site in stack.sites})
    if kinds != ["decoder"]:
        raise MethodError(
            f"virtual tokens as input embeddings are for models that are a decoder and nothing else; this one has "
            f"{', '.join(kinds)} attention"
        )
