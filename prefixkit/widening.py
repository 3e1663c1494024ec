"""Room for the prefix in front: wider masks and biases, and longer keys and values.

Masks come in three kinds: none, a tensor (boolean or additive), and flex attention's block mask,
which is a function of indices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from prefixkit import transformers_internals as internals

if TYPE_CHECKING:
    from collections.abc import Callable


def widen_mask(mask: torch.Tensor, seen: torch.Tensor | None, columns: int) -> torch.Tensor:
    """``mask (batch, 1, queries, keys)``, boolean or additive, with the prefix's columns in front.

    Args:
        mask: The mask of the real keys.
        seen: Which queries see which virtual tokens, ``(batch or 1, 1, queries or 1, columns)``;
            ``None``: all do.
        columns: Length P of the prefix.
    """
    batch = max(mask.shape[0], 1 if seen is None else seen.shape[0])
    mask = mask.expand(batch, -1, -1, -1)
    if seen is None:
        front = mask.new_ones(1) if mask.dtype == torch.bool else mask.new_zeros(1)
    elif mask.dtype == torch.bool:
        front = seen.to(mask.device)
    else:
        hidden = torch.finfo(mask.dtype).min
        front = torch.where(seen.to(mask.device), mask.new_zeros(()), hidden)
    return torch.cat([front.expand(*mask.shape[:-1], columns), mask], dim=-1)


def widen_block_mask(mask: Any, seen: torch.Tensor | None, columns: int, batch: int) -> Any:
    """Flex attention's block mask with the prefix's columns in front; as :func:`widen_mask`."""
    real: Callable[..., torch.Tensor] = mask.mask_mod
    queries, keys = mask.seq_lengths
    # Each row of the mask is looked up by its number.
    seen = None if seen is None else seen.expand(batch, -1, queries, -1)

    def wider(row: Any, head: Any, query: Any, key: torch.Tensor) -> torch.Tensor:
        is_prefix = key < columns
        allowed = is_prefix if seen is None else is_prefix & seen[row, 0, query, key.clamp(max=columns - 1)]
        return allowed | (~is_prefix & real(row, head, query, (key - columns).clamp(min=0)))

    return internals.new_block_mask(wider, batch, queries, keys + columns, mask.kv_num_blocks.device)


def widen_bias(bias: torch.Tensor, front: torch.Tensor | None, columns: int, batch: int) -> torch.Tensor:
    """``bias (batch or 1, heads, queries, keys)`` with the prefix's columns in front, one for each row.

    Args:
        bias: The bias of the real keys.
        front: The bias of the prefix's columns, ``(batch or 1, heads, queries, columns)``;
            ``None`` stands for zeros.
        columns: Length P of the prefix.
        batch: Rows; flex attention looks the bias up by row.
    """
    front = bias.new_zeros(1, 1, 1, 1) if front is None else front.to(bias)
    wide = (front.expand(batch, *bias.shape[1:-1], columns), bias.expand(batch, -1, -1, -1))
    return torch.cat(wide, dim=-1)


def hide_columns(bias: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """``bias (batch, heads, queries, P + keys)`` in which queries do not see virtual tokens that are not theirs.

    Args:
        bias: Additive, with the prefix's columns in front.
        seen: Which queries see which of these, ``(batch or 1, 1, queries or 1, P)``.
    """
    columns = seen.shape[-1]
    front = bias[..., :columns].masked_fill(~seen.to(bias.device), torch.finfo(bias.dtype).min)
    return torch.cat([front, bias[..., columns:]], dim=-1)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``mask``, boolean or additive, as numbers to add to scores.

    What is hidden gets the least number of ``dtype``: of a row of -inf torch's flash kernel says a log-sum-exp of 0.
    """
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least)
    return mask.to(dtype).clamp(min=least)


def as_in_call(prefix: torch.Tensor, own: torch.Tensor, dropout: float) -> torch.Tensor:
    """``prefix`` where ``own`` is and of its dtype, with a share of its numbers dropped."""
    prefix = prefix.to(device=own.device, dtype=own.dtype)
    return functional.dropout(prefix, dropout) if dropout else prefix


def put_in_front(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """``prefix (kv_heads, P, dim)``, or one for each row, in front of ``own (batch, kv_heads, keys, dim)``."""
    return torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], dim=2)
