"""What one waits for before anything runs: imports, a prefix on a model, its files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, PrefixTuningConfig, get_peft_model

import prefixkit
from benchmarks.speed import models
from benchmarks.speed.cells import PEFT, PREFIXKIT, Cell
from benchmarks.speed.children import ask
from benchmarks.speed.prefixed import made
from benchmarks.speed.timing import Conditions, Contender, Values

FIRST_USE = "prefixkit.apply"
IMPORTS = {
    PREFIXKIT: "import prefixkit",
    FIRST_USE: "import prefixkit; prefixkit.apply",
    PEFT: "import peft",
    "torch": "import torch",
    "transformers": "import transformers; transformers.PreTrainedModel",
}


def imports(cell: Cell, conditions: Conditions) -> Values:
    """Seconds of an import in a fresh interpreter, in turns; the interpreter's own start is not in it."""
    values: Values = {name: [] for name in cell.contenders}
    for number in range(-1, conditions.repeats):  # the first round fills the disk's cache
        for name in cell.contenders:
            code = f"import time; start = time.perf_counter()\n{IMPORTS[name]}\nprint(time.perf_counter() - start)"
            seconds = ask(["-c", code])
            if number >= 0:
                values[name].append(round(seconds, 6))
    return values


def apply(cell: Cell, _: Conditions) -> list[Contender]:
    """A new prefix on a model without weights."""
    base = models.make(cell.model, cell.attention, "meta")
    options = {"num_virtual_tokens": cell.tokens}
    calls: dict[str, Callable[[Any], Any]] = {
        PREFIXKIT: lambda model: prefixkit.apply(model, init="random", **options),
        PEFT: lambda model: get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", **options)),
    }
    return [Contender(name, calls[name], partial(models.twin, base)) for name in cell.contenders]


def save(cell: Cell, conditions: Conditions) -> list[Contender]:
    """A prefix to a new folder."""
    base = models.make(cell.model, cell.attention, conditions.device, conditions.dtype)
    ready = made(cell.contenders, base, cell.tokens, trainable=True)
    calls: dict[str, Callable[[Any], Any]] = {
        PREFIXKIT: partial(prefixkit.save, ready[PREFIXKIT]),
        PEFT: ready[PEFT].save_pretrained,
    }
    return [Contender(name, calls[name], partial(tempfile.mkdtemp, dir=_folder())) for name in cell.contenders]


def load(cell: Cell, conditions: Conditions) -> list[Contender]:
    """A saved prefix, each in its own format, onto a model that is there."""
    base = models.make(cell.model, cell.attention, conditions.device, conditions.dtype)
    saving = save(cell, conditions)
    folders = {one.name: one.before() for one in saving}
    for one in saving:
        one.run(folders[one.name])
    calls: dict[str, Callable[[Any], Any]] = {
        PREFIXKIT: lambda model: prefixkit.load(model, folders[PREFIXKIT]),
        PEFT: lambda model: PeftModel.from_pretrained(model, folders[PEFT]),
    }
    return [Contender(name, calls[name], partial(models.twin, base)) for name in cell.contenders]


def _folder() -> Path:
    """In memory where there is such a place, so that no disk is measured."""
    shared = Path("/dev/shm")  # noqa: S108 - for a folder with a random name
    return Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
