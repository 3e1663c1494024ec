"""Plots of what was measured, and the tables beside them in the documentation."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

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
    shown = [[name for name in names if compared(entry, name, beside)] for entry in entries]
    bars = sum(map(len, shown))
    figure, axes = plt.subplots(figsize=(7.2, 1.4 + 0.22 * (bars + len(entries))))
    place, left = 0, {"transform": axes.get_yaxis_transform(), "fontsize": "small", "va": "center"}
    for entry, present in zip(entries, shown, strict=True):
        axes.text(0.01, place, entry["label"], **left, bbox={"color": "white", "pad": 1})
        for row, name in enumerate(present, start=place + 1):
            ratio = compared(entry, name, beside) or 1
            axes.barh(row, ratio - 1, left=1, color=f"C{names.index(name) % 10}", height=0.8)
            axes.text(max(ratio, 1), row, f" {name} {ratio:.3g}", fontsize="x-small", va="center")
        place += len(present) + 1
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 0.6, 1, 1.5, 2, 3, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"relative to {beside}")
    figure.tight_layout()
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / f"{grid}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
