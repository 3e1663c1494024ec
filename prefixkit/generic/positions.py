"""How a watched stack counts positions: told by what changes when they are moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.adapter import PositionIds, Positions, PositionTable, Stack
from prefixkit.generic.watching import Change, Watched, watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOVE = 3
"""How far positions are moved to see what moves with them."""
FIRST_ROWS = 8
"""The rows of a table that a first position is looked for in."""


def positions_of(model: PreTrainedModel, inputs: Mapping[str, Any], stack: Stack) -> Positions | None:
    """Position ids, a table, or ``None`` where positions cannot be moved from outside."""
    module = model.get_submodule(stack.path)
    if _counts_from_zero(model.config.get_text_config()):
        return None
    before = watch(model, inputs, {stack.path: dict})
    if internals.takes(module, "position_ids"):
        return _position_ids(model, inputs, stack, before)
    return _position_table(module, stack, before)


def _counts_from_zero(config: Any) -> bool:
    """Whether moved positions would mean something else than a text that begins later.

    Compressed blocks of keys are counted from position 0, and a token moved past them would see later ones.
    A longrope changes its rotation at a length that ``generate`` counts by itself. An indexer that compares
    positions with the places of keys would show later tokens.
    """
    if internals.indexes_by_place(config):
        return True
    kinds = getattr(config, "layer_types", None) or ()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return any("compress" in str(kind) for kind in kinds) or "longrope" in str(rope)


def _position_ids(
    model: PreTrainedModel, inputs: Mapping[str, Any], stack: Stack, before: Watched
) -> PositionIds | None:
    """The ids that give what the stack does by itself, if others give something else."""
    given = before.arguments[stack.path].get("position_ids")
    tokens = _tokens(before.arguments[stack.path])
    if tokens is None:
        return None
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    for offset in _first_ids(model) if given is None else (0,):
        ids = places + offset if given is None else given
        same, moved = (_try(model, inputs, stack, places) for places in (ids, ids + MOVE))
        if same is None or moved is None or _starts_anew(same, moved, stack):
            continue
        if _equal(before, same, stack) and not _equal(same, moved, stack):
            first = offset if given is None else int(given.min())
            return PositionIds(limit=_limit(model, same, moved, tokens.shape[1]), offset=first)
    return None


def _first_ids(model: PreTrainedModel) -> list[int]:
    """The ids that the first position is looked for under; some count from behind that of the padding."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return sorted({0, 1, 2, 3, padding + 1 if isinstance(padding, int) else 0})


def _try(model: PreTrainedModel, inputs: Mapping[str, Any], stack: Stack, ids: torch.Tensor) -> Watched | None:
    """A pass in which the stack gets ``ids``, with what the layers of other kinds were given and gave."""
    notes: dict[str, Change] = dict.fromkeys(_layers_of_other_kinds(model, stack), dict)
    try:
        return watch(model, inputs, {**notes, stack.path: lambda arguments: {**arguments, "position_ids": ids}})
    except Exception:  # noqa: BLE001 - a model may refuse ids for reasons of its own
        return None


def _layers_of_other_kinds(model: nn.Module, stack: Stack) -> list[str]:
    """Modules with weights inside the stack, beside its attention, that take position ids."""
    sites = [site.path + "." for site in stack.sites]
    return [
        path
        for path, module in model.get_submodule(stack.path).named_modules(prefix=stack.path)
        if internals.takes(module, "position_ids")
        and not any(site.startswith(path + ".") or path.startswith(site) for site in sites if path)
        and path != stack.path
        and any(True for _ in module.parameters())
        and not any(isinstance(part, nn.Embedding) for part in module.modules())
    ]


def _starts_anew(same: Watched, moved: Watched, stack: Stack) -> bool:
    """Whether a layer of another kind gives something else for the same states: it begins a state at position 0."""
    for path, arguments in same.arguments.items():
        if path == stack.path or path not in moved.arguments:
            continue
        states, others = (_first_tensor(given) for given in (arguments, moved.arguments[path]))
        one, other = (_first_tensor(seen.outputs.get(path)) for seen in (same, moved))
        if states is None or others is None or one is None or other is None:
            continue
        if torch.equal(states, others) and not torch.equal(one, other):
            return True
    return False


def _first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor of floating numbers among arguments or outputs."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
    return next((part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()), None)


def _equal(one: Watched, other: Watched, stack: Stack) -> bool:
    """Whether queries and keys of the stack's sites are the same in both."""
    here = {site.path for site in stack.sites}
    pairs = zip(one.calls, other.calls, strict=False)
    return len(one.calls) == len(other.calls) and all(
        torch.allclose(a.query, b.query, atol=1e-5) and torch.allclose(a.key, b.key, atol=1e-5)
        for a, b in pairs
        if a.path in here
    )


def _limit(model: nn.Module, same: Watched, moved: Watched, tokens: int) -> int | None:
    """How many positions the table has in which the ids are looked up, or ``None``: there is none."""
    limits: list[int] = []
    for path, rows in same.looked_up.items():
        table = model.get_submodule(path)
        first, then = (_first_row(table, seen, tokens) for seen in (rows, moved.looked_up.get(path)))
        if first is not None and then == first + MOVE:
            limits.append(_rows_of(table) - first)
    return min(limits, default=None)


def _position_table(module: nn.Module, stack: Stack, seen: Watched) -> PositionTable | None:
    """The one embedding inside the stack that gave consecutive rows."""
    tokens = _tokens(seen.arguments[stack.path])
    found: list[PositionTable] = []
    for path, output in seen.looked_up.items():
        inside = path.removeprefix(stack.path + ".") if stack.path else path
        if (not stack.path or path.startswith(stack.path + ".")) and seen.turns[path] == 1 and tokens is not None:
            table = module.get_submodule(inside)
            first = _first_row(table, output, tokens.shape[1])
            if first is not None:
                found.append(PositionTable(path=inside, offset=first, limit=_rows_of(table) - first))
    return found[0] if len(found) == 1 else None


def _first_row(table: nn.Module, output: Any, tokens: int) -> int | None:
    """The row with which a table's consecutive output starts."""
    assert isinstance(table, nn.Embedding)
    if not isinstance(output, torch.Tensor) or output.shape[-2:] != (tokens, table.embedding_dim):
        return None
    if table.weight.is_meta:
        return None
    rows = output.reshape(-1, tokens, table.embedding_dim)[0]
    for first in range(min(FIRST_ROWS, table.num_embeddings - tokens)):
        if torch.equal(table.weight[first : first + tokens].to(rows), rows):
            return first
    return None


def _rows_of(table: nn.Module) -> int:
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def _tokens(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Token ids ``(batch, tokens)`` or embeddings ``(batch, tokens, dim)`` among the arguments."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), torch.Tensor):
            value: torch.Tensor = arguments[name]
            return value if value.ndim in (2, 3) and value.shape[0] == 1 else None
    return None
