"""One attention call of a bare model, as the kit sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of the attention function; off the interface, one update of the cache, or what is computed so.

    Attributes:
        path: The module that called.
        query: ``(batch, heads, queries, key_dim)``.
        key: ``(batch, kv_heads, keys, key_dim)``, after rotation and after the cache update.
        value: ``(batch, kv_heads, keys, value_dim)``.
        mask: What the attention function was given.
        options: Its further keyword arguments.
        layer: Which layer of the cache is updated; ``None`` for the attention function.
    """

    path: str
    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]
    layer: int | None = None
