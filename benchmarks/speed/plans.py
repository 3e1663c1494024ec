"""The grids: which cells each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.speed.cells import (
    ADAPTERHUB,
    ADAPTERHUB_BASE,
    BASE,
    CACHE_ENGINE,
    COMPILED,
    NATIVE,
    PEFT,
    PEFT_MLP,
    PREFIXKIT,
    PREFIXKIT_MLP,
    STATIC,
    Cell,
)
from benchmarks.speed.memory import CHECKPOINTED
from benchmarks.speed.start import FIRST_USE


@dataclass(frozen=True)
class Grid:
    """A named plan.

    Attributes:
        about: A sentence on what is measured.
        cells: What is run on a CPU.
        beside: The contender that the others are shown relative to.
        on_gpu: What is run beside that with ``--device cuda``.
    """

    about: str
    cells: tuple[Cell, ...]
    beside: str = BASE
    on_gpu: tuple[Cell, ...] = ()


def vary(cell: Cell, field: str, values: Sequence[object]) -> list[Cell]:
    """The cell with each of these values."""
    return [replace(cell, **{field: value}) for value in values]


def train() -> Grid:
    """Steps."""
    start = Cell(kind="step", model="llama-25m", contenders=(PREFIXKIT, PEFT, BASE), batch=8)
    cells = [
        replace(start, contenders=(PREFIXKIT, CACHE_ENGINE, PEFT, BASE, ADAPTERHUB, ADAPTERHUB_BASE)),
        *vary(start, "batch", (1, 2)),
        *vary(replace(start, batch=2), "length", (32, 512)),
        *vary(replace(start, batch=2), "tokens", (200, 1024, 4096)),
        replace(start, model="gpt2-124m", batch=2),
        replace(start, model="t5-small"),
    ]
    large = [replace(start, model=model, length=512) for model in ("llama-1b", "llama-8b")]
    return Grid("a training step: forward, and backward to the prefix", tuple(cells), on_gpu=tuple(large))


def attention() -> Grid:
    """Steps by implementation."""
    start = Cell(kind="step", model="llama-25m", contenders=(PREFIXKIT, PEFT, BASE), batch=8)
    sizes = [start, replace(start, batch=1, length=512), replace(start, batch=2, tokens=200)]
    cells = [replace(size, attention=name) for size in sizes for name in ("eager", "sdpa")]
    return Grid("a training step by attention implementation", tuple(cells))


def projection() -> Grid:
    """Steps with an MLP."""
    names = (PREFIXKIT, PREFIXKIT_MLP, PEFT, PEFT_MLP, BASE)
    start = Cell(kind="step", model="narrow-gpt2", contenders=names, length=4)
    return Grid("a training step with and without an MLP of 2048", tuple(vary(start, "batch", (1, 16))))


def memory() -> Grid:
    """Memory of steps."""
    names = (CHECKPOINTED, PREFIXKIT, PEFT, f"{PEFT}, checkpointed", f"{BASE}, checkpointed", BASE)
    start = Cell(kind="memory", model="deep-llama", contenders=names, batch=2, length=512)
    far = replace(start, kind="longest", contenders=(CHECKPOINTED, PEFT), batch=1, length=0)
    return Grid("memory of a training step, and the longest text in 256 MiB", (start, far), beside=PEFT)


def decode() -> Grid:
    """Generation."""
    names = (PREFIXKIT, PEFT, BASE, NATIVE)
    start = Cell(kind="decode", model="llama-25m", contenders=names, length=16, new_tokens=24)
    every = (*names, CACHE_ENGINE, ADAPTERHUB, ADAPTERHUB_BASE)
    names = (PREFIXKIT_MLP, PEFT_MLP, BASE)
    static = tuple(name + how for how in (STATIC, COMPILED) for name in (PREFIXKIT, BASE))
    cells = [
        replace(start, contenders=(*every, *static)),
        replace(start, contenders=every, batch=8),
        *vary(replace(start, batch=16), "tokens", (200, 1024)),
        replace(start, batch=32, tokens=2048),
        replace(start, model="narrow-gpt2", contenders=names),
        replace(start, model="t5-small", batch=8, contenders=(PREFIXKIT, PEFT, BASE)),
    ]
    large = [replace(start, model=model, batch=8, tokens=1024) for model in ("llama-1b", "llama-8b")]
    return Grid("greedy decoding of 24 tokens after a prompt of 16", tuple(cells), on_gpu=tuple(large))


def start() -> Grid:
    """Before anything runs."""
    both = (PREFIXKIT, PEFT)
    cells = (
        Cell(kind="import", model="none", contenders=(PREFIXKIT, FIRST_USE, PEFT, "torch", "transformers")),
        Cell(kind="apply", model="llama-8b", contenders=both),
        Cell(kind="save", model="llama-25m", contenders=both),
        Cell(kind="load", model="llama-25m", contenders=both),
    )
    return Grid("imports in fresh interpreters; a prefix on a model without weights; its files", cells, beside=PEFT)


GRIDS = {make.__name__: make() for make in (train, projection, memory, decode, start, attention)}


def smallest(cell: Cell) -> Cell:
    """The same job for a tiny model, for tests."""
    tiny = {"llama-25m": "tiny-llama", "deep-llama": "tiny-llama", "narrow-gpt2": "tiny-gpt2", "none": "none"}
    small = {"batch": min(cell.batch, 2), "length": min(cell.length, 12), "tokens": min(cell.tokens, 5)}
    model = tiny.get(cell.model, "tiny-" + cell.model.split("-")[0])
    quick = tuple(name for name in cell.contenders if not name.endswith(COMPILED))  # compiling takes minutes
    return replace(cell, model=model, contenders=quick, new_tokens=min(cell.new_tokens, 4), **small)
