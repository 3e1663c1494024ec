"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.speed.findings import Entry, compared, middle, results_of
from benchmarks.speed.plans import GRIDS


def shown(entry: Entry, name: str, beside: str) -> str:
    """A median with its unit and, in brackets, how it compares; a dash for who could not, nothing for who was not."""
    value = middle(entry, name)
    if value is None:
        return "—" if name in entry["values"] else ""
    relative = compared(entry, name, beside)
    return in_words(entry["kind"], value) + (f" (× {relative:.2f})" if relative is not None else "")


def in_words(kind: str, value: float) -> str:
    """With a unit."""
    if kind == "longest":
        return f"{value:.0f} tokens"
    if kind == "memory":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.2f} s" if value >= 10 else f"{1000 * value:.{0 if value >= 0.1 else 1}f} ms"


def columns(entries: Iterable[Entry]) -> list[str]:
    """Everyone who took part, in the order of appearance."""
    return list(dict.fromkeys(name for entry in entries for name in entry["values"]))


def table(entries: Sequence[Entry], beside: str) -> str:
    """A Markdown table: a line for each cell, a column for each contender."""
    names = columns(entries)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    lines += [
        f"| {entry['label']} | " + " | ".join(shown(entry, name, beside) for name in names) + " |" for entry in entries
    ]
    return "\n".join(lines)


def tables(entries: Sequence[Entry], beside: str) -> str:
    """A table for each set of contenders, so that none is mostly empty."""
    sets = dict.fromkeys(tuple(entry["values"]) for entry in entries)
    groups = ([entry for entry in entries if tuple(entry["values"]) == names] for names in sets)
    return "\n\n".join(table(group, beside) for group in groups)


def conditions(entries: Sequence[Entry]) -> str:
    """On what, and with what, a line for each that differs."""
    lines = (
        f"{entry['machine']}, {entry['threads']} threads, {entry['repeats']} runs each, commit {entry['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        for entry in entries
    )
    loads = sorted(entry["load"] for entry in entries)
    busy = f"load of the machine at the end of each: {loads[0]} to {loads[-1]}"
    return "\n".join([*dict.fromkeys(lines), busy])


def text(grid: str) -> str:
    """What ``show`` prints."""
    entries = results_of(grid)
    if not entries:
        return f"nothing measured; python -m benchmarks.speed run {grid}"
    return f"{tables(entries, GRIDS[grid].beside)}\n\n{conditions(entries)}"
