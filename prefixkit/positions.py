"""Moving the positions of real tokens behind the prefix.

Under ``shift`` the first real token stands at position P, under ``none`` at 0. Either way the
count comes from the attention mask where the caller gives no positions, so that a left-padded row
gets the positions it has alone.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prefixkit import placement
from prefixkit.adapter import PositionIds, PositionTable, Stack
from prefixkit.call import StackCall
from prefixkit.errors import EngineError

_under_way = threading.local()
"""The rows to look up in the call under way, by table. Nothing comes between the stack's hook, which
writes them, and the table's, which takes them, but the start of the stack's own forward."""


def place_positions(
    module: nn.Module,
    stack: Stack,
    arguments: dict[str, Any],
    call: StackCall,
    offset: int | tuple[int, ...],
    *,
    moved: Any = True,
) -> torch.Tensor:
    """Give the stack its positions, moved by ``offset``, in ``arguments`` or in its table.

    The offset is one for all rows, or one for each. Only those that ``moved (batch or 1, queries)`` says are moved.

    Returns:
        The positions of the real tokens before moving, ``(batch or 1, queries)``.

    Raises:
        EngineError: If the model has no position that far.
    """
    kind = stack.positions
    by_row = offset if isinstance(offset, int) else torch.tensor(offset, device=call.device)[:, None]
    if isinstance(kind, PositionIds):
        given = arguments.get("position_ids")
        # Some models (XLM) want ids for every row.
        real = call.token_positions().expand(call.batch, -1) if given is None else given - kind.offset
        _check_limit(real, kind.limit, offset, call)
        arguments["position_ids"] = real + by_row * moved + kind.offset
        return real
    real = call.token_positions()
    if isinstance(kind, PositionTable):
        _check_limit(real, kind.limit, offset, call)
        _under_way.rows = (id(module.get_submodule(kind.path)), real + by_row * moved + kind.offset)
    return real


def count_positions(module: nn.Module, stack: Stack, arguments: dict[str, Any]) -> None:
    """Positions of a stack without a prefix: not moved, but counted from the mask like the others'."""
    if stack.positions is None:
        return
    cache = arguments.get("past_key_values") if stack.name == "decoder" else None
    call = StackCall.read(arguments, cache.get_seq_length() if cache is not None else 0)
    place_positions(module, stack, arguments, call, offset=0)


def look_up_placed(table: nn.Embedding, _: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a position table: the rows that were placed, ``(batch or 1, queries, dim)``."""
    key, rows = getattr(_under_way, "rows", None) or (None, None)
    if key != id(table) or rows is None:
        return output
    forget_positions()
    if table.weight.is_meta:
        raise EngineError(
            "the position table is offloaded, and the prefix moves positions in it; keep it on a device in the device "
            "map"
        )
    weight = placement.whole(table.weight)
    return functional.embedding(rows.to(weight.device), weight)


def forget_positions() -> None:
    """Drop what a call that failed before its look-up left behind."""
    _under_way.rows = None


def _check_limit(real: torch.Tensor, limit: int | None, offset: int | tuple[int, ...], call: StackCall) -> None:
    """Refuse a position past the table's end; reads values only where one might be."""
    most = offset if isinstance(offset, int) else max(offset)
    if limit is None or not isinstance(call.past, int) or most + call.past + call.queries <= limit:
        return
    last = int((real + torch.tensor(offset, device=real.device).reshape(-1, 1)).max())
    if last >= limit:
        takes = f", of which the prefix takes {most}" if most else ""
        instead = " or the prefix, or pass positions='none'" if most else ""
        raise EngineError(f"position {last} is past the model's {limit} positions{takes}; shorten the input{instead}")
