"""What the studies found so far: lines of JSON, and how they are put together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Entry = dict[str, Any]

GROUPING = ("task", "arm", "rows")
"""Settings by which results are told apart, beside the learning rate and the seed."""


def results_of(study: str) -> list[Entry]:
    """All results of a study, in the order in which they came."""
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def groups(entries: Iterable[Entry], x: str = "learning_rate") -> dict[str, dict[Any, list[Entry]]]:
    """Results by line of the plot, and by value of ``x``; a line is named after the settings that differ."""
    entries = list(entries)
    tasks = len({entry["task"] for entry in entries})
    differ = ["task"] if tasks > 1 else []  # what goes with the task, such as its rows, needs no name beside it
    differ += [
        one for one in GROUPING[1:] if one != x and len({(entry["task"], entry[one]) for entry in entries}) > tasks
    ]
    found: dict[str, dict[Any, list[Entry]]] = {}
    for entry in entries:
        line = ", ".join(f"{entry[name]}" + " rows" * (name == "rows") for name in differ or GROUPING[:1])
        found.setdefault(line, {}).setdefault(entry[x], []).append(entry)
    return found


def mean_and_spread(entries: list[Entry], what: str = "score") -> tuple[float, float]:
    """Mean and standard deviation over the seeds; the latter is 0 for one."""
    values = [float(entry[what]) for entry in entries]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def best_rate(rates: dict[float, list[Entry]]) -> float:
    """The learning rate with the best score in the first seed, with which all of them were tried."""
    first = min(entry["seed"] for entries in rates.values() for entry in entries)
    scores = {rate: entry["score"] for rate, entries in rates.items() for entry in entries if entry["seed"] == first}
    return max(scores, key=lambda rate: scores[rate])


def at_best_rate(entries: Iterable[Entry]) -> list[Entry]:
    """Of each task, arm and size, the results with its best learning rate."""
    entries = list(entries)
    kept = []
    for own in {tuple(entry[name] for name in GROUPING): None for entry in entries}:
        rates: dict[float, list[Entry]] = {}
        for entry in entries:
            if tuple(entry[name] for name in GROUPING) == own:
                rates.setdefault(entry["learning_rate"], []).append(entry)
        kept += rates[best_rate(rates)]
    return kept
