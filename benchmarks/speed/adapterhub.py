"""AdapterHub's prefix tuning, in a process of its own on its own transformers.

``adapters`` needs a transformers of its own, laid over the one torch::

    pip install --no-deps --target FOLDER adapters==1.3.0
    pip install --target FOLDER transformers==4.57.6
    python -m benchmarks.speed run train --adapterhub FOLDER

What another process takes on another transformers is not side by side with the rest. So the base is measured there
too, in turns with the prefix, and tables show the ratio of the two.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from benchmarks.speed import models
from benchmarks.speed.cells import ADAPTERHUB, ADAPTERHUB_BASE, Cell
from benchmarks.speed.children import ChildError, ask
from benchmarks.speed.jobs import batch_of, forget, generate, step, step_to_embeddings
from benchmarks.speed.timing import Conditions, Contender, Values, in_turns

OVERLAY = "ADAPTERHUB_OVERLAY"
"""The environment variable that names the folder."""
BOTH = {ADAPTERHUB, ADAPTERHUB_BASE}


def without(cell: Cell) -> Cell:
    """The cell with those who run in this process."""
    return replace(cell, contenders=tuple(name for name in cell.contenders if name not in BOTH))


def in_child(cell: Cell, conditions: Conditions) -> tuple[Values, Values]:
    """Seconds and processor seconds of AdapterHub and of its base; none without the overlay, and the reason printed."""
    folder = os.environ.get(OVERLAY, "")
    if not folder:
        print(f"  {ADAPTERHUB} is left out: --adapterhub or {OVERLAY} names no folder that has it")
        return {}, {}
    try:
        values, worked = ask(["-m", __name__, json.dumps([asdict(cell), asdict(conditions)])], path=folder)
    except ChildError as error:
        print(f"  {ADAPTERHUB} is left out: {error}")
        return {}, {}
    return values, worked


def with_prefix(base: Any, tokens: int, *, trainable: bool) -> Any:
    """A flat prefix of AdapterHub on the same weights."""
    import adapters

    model = models.twin(base)
    adapters.init(model)
    model.add_adapter("prefix", config=adapters.PrefixTuningConfig(flat=True, prefix_length=tokens, dropout=0.0))
    model.train_adapter("prefix")
    return model.train() if trainable else model.requires_grad_(False).eval()


def contenders(cell: Cell, conditions: Conditions) -> list[Contender]:
    """AdapterHub and its base, in a step or in decoding."""
    base = models.make(cell.model, cell.attention, conditions.device, conditions.dtype)
    trains = cell.kind == "step"
    ready = {ADAPTERHUB: with_prefix(base, cell.tokens, trainable=trains), ADAPTERHUB_BASE: models.twin(base)}
    batch = batch_of(base, cell, conditions.device)
    if trains:
        runs = {ADAPTERHUB: step, ADAPTERHUB_BASE: step_to_embeddings}
        check(ready[ADAPTERHUB], batch)
        return [
            Contender(name, partial(run, ready[name], batch), partial(forget, ready[name]))
            for name, run in runs.items()
        ]
    del batch["labels"]
    return [Contender(name, lambda _, model=model: generate(model, cell, batch)) for name, model in ready.items()]


def check(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Gradients reach the prefix."""
    step(model, batch)
    assert any(value.grad is not None and value.grad.any() for value in model.parameters())


def main() -> None:
    """What the child does."""
    fields, settings = json.loads(sys.argv[1])
    cell, conditions = Cell(**{**fields, "contenders": tuple(fields["contenders"])}), Conditions(**settings)
    torch.set_num_threads(conditions.threads)
    print(json.dumps(in_turns(contenders(cell, conditions), conditions)))


if __name__ == "__main__":
    main()
