"""Results: a line of JSON for each cell, the last measurement of it on each machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.cells import ADAPTERHUB, ADAPTERHUB_BASE, Cell
from benchmarks.speed.timing import Conditions

RESULTS = Path(__file__).parent / "results"
Entry = dict[str, Any]
SAME = ("label", "device", "machine", "threads")
"""By what a measurement replaces an older one."""


def machine(device: str) -> str:
    """The processor or the card, and how many."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else "unknown"


def commit() -> str:
    """The commit of this checkout, with ``+`` if its package is changed."""
    there = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*there, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*there, "diff", "--quiet", "HEAD", "--", ":/prefixkit", ":/plugins"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + "+" * bool(changed.returncode)


def entry_of(cell: Cell, conditions: Conditions, values: dict[str, list[float]], **more: Any) -> Entry:
    """What is written down."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "label": cell.label,
        **{name: value for name, value in asdict(cell).items() if name != "contenders"},
        **asdict(conditions),
        "values": values,
        **more,
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(conditions.device),
        "commit": commit(),
        "versions": versions,
    }


def results_of(grid: str) -> list[Entry]:
    """All of them, in the order of their first measurement."""
    path = RESULTS / f"{grid}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(grid: str, entry: Entry) -> None:
    """Add an entry, in the place of the one before."""
    entries = {tuple(one[name] for name in SAME): one for one in (*results_of(grid), entry)}
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in entries.values())
    (RESULTS / f"{grid}.jsonl").write_text(text, encoding="utf-8")


def middle(entry: Entry, name: str) -> float | None:
    """The median of a contender's runs, or nothing if it has none."""
    values = entry["values"].get(name)
    return statistics.median(values) if values else None


def compared(entry: Entry, name: str, beside: str) -> float | None:
    """A contender's ratio to ``beside``; AdapterHub's to the base that ran in its own process."""
    if name in {beside, ADAPTERHUB_BASE}:
        return None
    return ratio(entry, name, ADAPTERHUB_BASE if name == ADAPTERHUB else beside)


def ratio(entry: Entry, name: str, beside: str, by: str = "values") -> float | None:
    """The median over the rounds of what one has to the other; the two of a round ran one after the other."""
    found = entry.get(by, {})
    if not found.get(name) or not found.get(beside):
        return None
    return statistics.median(one / other for one, other in zip(found[name], found[beside], strict=True))
