"""Measure a grid, show what was measured, or check it against what prefixkit has to reach.

    python -m benchmarks.speed run train
    python -m benchmarks.speed show train
    python -m benchmarks.speed check

``run`` measures every cell of the grid, everyone in turns, and replaces what was measured on this machine before.
``show`` prints a table, each median with its ratio, and writes it and a plot for the documentation.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.speed import criteria, report
from benchmarks.speed.adapterhub import OVERLAY
from benchmarks.speed.findings import results_of, write
from benchmarks.speed.measuring import measure
from benchmarks.speed.plans import GRIDS
from benchmarks.speed.timing import Conditions


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("what", choices=["run", "show", "check"])
    made.add_argument("grid", nargs="?", choices=[*GRIDS, "all"], default="all", help="default: all")
    made.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    made.add_argument("--repeats", type=int, default=7, help="runs that count (default: 7)")
    made.add_argument("--warmup", type=int, default=2, help="runs before them (default: 2)")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--adapterhub", default=os.environ.get(OVERLAY, ""), help=f"folder with adapters (or {OVERLAY})")
    made.add_argument("--only", default="", help="cells whose label has this text in it")
    return made


def run(grid: str, conditions: Conditions, only: str) -> None:
    """Measure the cells and print each as it ends."""
    plan = GRIDS[grid]
    for cell in (*plan.cells, *plan.on_gpu * (conditions.device == "cuda")):
        if only in cell.label:
            entry = measure(cell, conditions)
            write(grid, entry)
            shown = (f"{name} {report.shown(entry, name, plan.beside)}" for name in entry["values"])
            print(f"{cell.label}: " + ", ".join(shown), flush=True)


def draw(grid: str) -> None:
    """Draw the plot, where there is something to draw, and to draw it with."""
    if importlib.util.find_spec("matplotlib") is None:
        print("pip install -r benchmarks/requirements.txt draws a plot too")
        return
    from benchmarks.speed.plots import plot, write_table

    if results_of(grid):
        write_table(grid)
    print(plot(grid) or "")


def main(given: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = parser().parse_args(given)
    conditions = Conditions(arguments.device, arguments.threads, arguments.repeats, arguments.warmup)
    torch.set_num_threads(conditions.threads)
    os.environ[OVERLAY] = arguments.adapterhub
    transformers.logging.set_verbosity_error()
    for grid in GRIDS if arguments.grid == "all" else [arguments.grid]:
        if arguments.what == "run":
            run(grid, conditions, arguments.only)
        elif arguments.what == "show":
            print(f"{grid}: {GRIDS[grid].about}\n\n{report.text(grid)}\n")
            draw(grid)
        print("\n".join(criteria.lines(grid)))


if __name__ == "__main__":
    main()
