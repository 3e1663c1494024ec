"""From a cell to its entry."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.speed import adapterhub, decode, memory, start, step
from benchmarks.speed.cells import Cell
from benchmarks.speed.findings import Entry, entry_of
from benchmarks.speed.timing import Conditions, Contender, Values, in_turns, peaks_on_cuda

IN_TURNS: dict[str, Callable[[Cell, Conditions], list[Contender]]] = {
    "step": step.contenders,
    "decode": decode.contenders,
    "apply": start.apply,
    "save": start.save,
    "load": start.load,
}
IN_CHILDREN: dict[str, Callable[[Cell, Conditions], Values]] = {
    "memory": memory.in_child,
    "longest": memory.in_child,
    "import": start.imports,
}


def measure(cell: Cell, conditions: Conditions) -> Entry:
    """Measure a cell."""
    if cell.kind in IN_CHILDREN:
        return entry_of(cell, conditions, IN_CHILDREN[cell.kind](cell, conditions))
    here = adapterhub.without(cell)
    contenders = IN_TURNS[cell.kind](here, conditions)
    values, worked = in_turns(contenders, conditions)
    more = {"peak_bytes": peaks_on_cuda(contenders)} if conditions.device == "cuda" else {}
    if here != cell:
        others, their_work = adapterhub.in_child(cell, conditions)
        values, worked = {**values, **others}, {**worked, **their_work}
    return entry_of(cell, conditions, values, processor=worked, **more)
