"""Where the time of a cell goes, by kinds of operators: ``python -m benchmarks.speed.where CELL``.

    python -m benchmarks.speed.where "decode, llama-25m, batch 16, length 16, P 1024, + 24"

Torch's profiler is on in one run of each contender, after one without it. What its operators do not account for is
Python, and the profiler's own cost.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import adapterhub
from benchmarks.speed.measuring import IN_TURNS
from benchmarks.speed.plans import GRIDS
from benchmarks.speed.timing import Conditions, Contender

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "copies": ("cat", "copy_", "clone", "index_select", "repeat_interleave"),
}
"""Kinds of operators, by what their names are or hold."""
REST = "other operators"
PYTHON = "Python"
CELLS = {cell.label: cell for plan in GRIDS.values() for cell in plan.cells if cell.kind in IN_TURNS}


def kind_of(operator: str) -> str:
    """The kind of an operator, called ``aten::name``."""
    name = operator.rpartition("::")[2]
    for kind, names in KINDS.items():
        if name in names or (kind == "attention" and any(part in name for part in names)):
            return kind
    return REST


def seconds_by_kind(contender: Contender) -> Counter[str]:
    """Seconds of one run by kind, Python included."""
    contender.run(contender.before())
    given = contender.before()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        contender.run(given)
        whole = time.perf_counter() - start
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    found[PYTHON] = max(0.0, whole - sum(found.values()))
    return found


def table(found: dict[str, Counter[str]]) -> str:
    """A Markdown table in milliseconds: a line for each kind, a column for each contender."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    lines += [
        f"| {kind} | " + " | ".join(f"{1000 * times[kind]:.0f}" for times in found.values()) + " |"
        for kind in (*KINDS, REST, PYTHON)
    ]
    return "\n".join(lines)


def main(given: Any = None) -> None:
    """Print the table of a cell."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.where",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("cell", choices=sorted(CELLS), metavar="CELL", help="its label in the tables")
    made.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    arguments = made.parse_args(given)
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    cell = adapterhub.without(CELLS[arguments.cell])
    contenders = IN_TURNS[cell.kind](cell, Conditions(threads=arguments.threads))
    print(f"{cell.label}, {arguments.threads} threads, milliseconds\n")
    print(table({one.name: seconds_by_kind(one) for one in contenders}))


if __name__ == "__main__":
    main()
