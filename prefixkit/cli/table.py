"""Tables for the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

GAP = 2
NARROWEST = 30


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the last one is wrapped at the terminal's width."""
    every = [tuple(heads), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(heads) - 1)]
    indent = sum(widths) + GAP * len(widths)
    room = max(NARROWEST, shutil.get_terminal_size((120, 24)).columns - indent)
    lines: list[str] = []
    for row in every:
        first = "".join(cell.ljust(width + GAP) for cell, width in zip(row, widths, strict=False))
        wrapped = textwrap.wrap(row[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [(first + wrapped[0]).rstrip(), *(" " * indent + more for more in wrapped[1:])]
    return "\n".join(lines)


def facts(values: Mapping[str, object]) -> str:
    """One line for each fact, with its name in front."""
    rows = [(name, str(value)) for name, value in values.items()]
    return table(*(rows[0], rows[1:])) if rows else ""
