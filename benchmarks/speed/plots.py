"""Plots of what was measured, and the tables beside them in the documentation."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.speed.cells import ADAPTERHUB_BASE
from benchmarks.speed.findings import compared, middle, results_of
from benchmarks.speed.plans import GRIDS
from benchmarks.speed.report import columns, tables

PLOTS = Path(__file__).parents[2] / "docs/_static/speed"


def write_table(grid: str) -> None:
    """The table that the page of the documentation includes."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    entries = results_of(grid)
    (PLOTS / f"{grid}.md").write_text(tables(entries, GRIDS[grid].beside) + "\n", encoding="utf-8")


def plot(grid: str) -> Path | None:
    """A group of bars for each cell, relative to the grid's measure; logarithmic, so that half and double are alike."""
    beside = GRIDS[grid].beside
    entries = [entry for entry in results_of(grid) if middle(entry, beside)]
    if not entries:
        return None
    names = [name for name in columns(entries) if name not in {beside, ADAPTERHUB_BASE}]
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.2 * (1 + len(names)) * len(entries)))
    for index, name in enumerate(names):
        places = [row * (len(names) + 1) + index for row in range(len(entries))]
        axes.barh(places, [(compared(entry, name, beside) or 1) - 1 for entry in entries], left=1, label=name)
    axes.set_yticks([row * (len(names) + 1) + (len(names) - 1) / 2 for row in range(len(entries))])
    axes.set_yticklabels([entry["label"] for entry in entries], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"relative to {beside}")
    axes.set_title(grid)
    axes.legend(fontsize="x-small")
    figure.tight_layout()
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / f"{grid}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
