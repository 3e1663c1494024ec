"""The memory of a training step, in a process of its own: ``python -m benchmarks.speed.memory CELL``.

The kernel keeps the largest resident set of a process (``VmHWM``) and forgets it when 5 is written to ``clear_refs``.
So a child loads the libraries and the model, makes one short step so that what is allocated once is there, gives
freed memory back to the kernel, forgets the largest set, makes the step, and reports by how much the new largest set
is above what was resident just before. ``ru_maxrss`` would not do: it cannot be reset, and counts loading.

Blocks of 64 KiB and more come from the kernel one by one (``MALLOC_MMAP_THRESHOLD_``), so that freed ones go back.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import models, prefixed
from benchmarks.speed.cells import BASE, PREFIXKIT, Cell
from benchmarks.speed.children import ChildError, ask
from benchmarks.speed.jobs import batch_of, forget, step, step_to_embeddings
from benchmarks.speed.step import check_gradients
from benchmarks.speed.timing import Conditions, Values

BUDGET = 256 * 2**20
GRAIN = 32
"""Lengths are looked for in steps of so many tokens, or of a sixteenth of what is found."""
CHECKPOINTED = f"{PREFIXKIT}, checkpointed"


def of_process(field: str) -> int:
    """Bytes that ``/proc/self/status`` has for ``VmRSS``, resident now, or ``VmHWM``, at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def added_by(run: Callable[[], Any]) -> int:
    """By how many bytes ``run`` raises the resident set at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = of_process("VmRSS")
    run()
    return of_process("VmHWM") - before


def model_of(cell: Cell, name: str) -> Any:
    """The contender's model, with gradient checkpointing where its name says so."""
    base = models.make(cell.model, cell.attention)
    kind = name.partition(",")[0]
    model = prefixed.made([kind], base, cell.tokens, trainable=True)[kind]
    if "checkpointed" in name:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def stepper(cell: Cell, name: str) -> Callable[[int], int]:
    """A function from a length to the bytes of a step."""
    model = model_of(cell, name)
    is_base = name.startswith(BASE)
    run = step_to_embeddings if is_base else step

    def measure(length: int) -> int:
        batch = batch_of(model, replace(cell, length=length), "cpu")
        added = added_by(lambda: run(model, batch))
        forget(model)
        return added

    if is_base:
        measure(8)
    else:
        check_gradients(name, model, batch_of(model, replace(cell, length=8), "cpu"))
        forget(model)
    return measure


def longest(measure: Callable[[int], int], budget: int = BUDGET) -> int:
    """A multiple of the grain whose step fits the budget, by doubling and halving; a sixteenth more does not fit."""
    low, high = 0, 4 * GRAIN
    while measure(high) <= budget:
        low, high = high, 2 * high
    while high - low > max(GRAIN, low // 16):
        middle = (low + high) // 2 // GRAIN * GRAIN
        low, high = (middle, high) if measure(middle) <= budget else (low, middle)
    return low


def in_child(cell: Cell, conditions: Conditions) -> Values:
    """One child for each contender; one that cannot do it has no value, and its reason is printed."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    return {name: of_child(cell, name, conditions.threads) for name in cell.contenders}


def of_child(cell: Cell, name: str, threads: int) -> list[float]:
    """The one value of a contender, or none."""
    try:
        value: list[float] = ask(["-m", __name__, json.dumps([asdict(cell), name, threads])])
    except ChildError as error:
        print(f"  {name}: {error}", flush=True)
        return []
    return value


def main() -> None:
    """What the child does."""
    fields, name, threads = json.loads(sys.argv[1])
    cell = Cell(**{**fields, "contenders": tuple(fields["contenders"])})
    torch.set_num_threads(threads)
    measure = stepper(cell, name)
    print(json.dumps([longest(measure)] if cell.kind == "longest" else [measure(cell.length)]))


if __name__ == "__main__":
    main()
