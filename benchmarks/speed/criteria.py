"""What prefixkit has to reach, and whether it does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.speed.cells import BASE, PEFT, PREFIXKIT, PREFIXKIT_MLP
from benchmarks.speed.findings import Entry, ratio, results_of
from benchmarks.speed.memory import CHECKPOINTED

Measured = Callable[[dict[str, Entry], str], float | None]
"""From the entries by label, and whether by ``"values"`` or by ``"processor"`` time."""
TRAIN = "step, llama-25m, batch 8, length 128, P 20"
DECODE = "decode, llama-25m, batch {}, length 16, P {}, + 24"


@dataclass(frozen=True)
class Criterion:
    """A limit.

    Attributes:
        grid: Where it is measured.
        about: What is compared with what.
        limit: At most.
        measured: From the grid's entries by label.
    """

    grid: str
    about: str
    limit: float
    measured: Measured


def of(label: str, name: str, beside: str) -> Measured:
    """One contender beside another in a cell."""
    return lambda entries, by: ratio(entries[label], name, beside, by) if label in entries else None


def own_cost(entry: Entry, name: str, without: str, by: str) -> float:
    """Seconds that the MLP adds to the step of the same prefix without one, in the median of the rounds."""
    pairs = zip(entry[by][name], entry[by][without], strict=True)
    return statistics.median(one - other for one, other in pairs)


def growth(name: str, without: str) -> Measured:
    """The MLP's own cost at batch 16 beside that at batch 1."""

    def measured(entries: dict[str, Entry], by: str) -> float | None:
        labels = [f"step, narrow-gpt2, batch {batch}, length 4, P 20" for batch in (16, 1)]
        if not set(labels) <= entries.keys():
            return None
        many, one = (own_cost(entries[label], name, without, by) for label in labels)
        return many / one

    return measured


CRITERIA = (
    Criterion("train", "step, P 20, batch 8, length 128: prefixkit / frozen base", 1.08, of(TRAIN, PREFIXKIT, BASE)),
    Criterion("train", "step, P 20, batch 8, length 128: prefixkit / PEFT", 1.03, of(TRAIN, PREFIXKIT, PEFT)),
    Criterion("projection", "own cost of the MLP: batch 16 / batch 1", 1.2, growth(PREFIXKIT_MLP, PREFIXKIT)),
    Criterion(
        "memory",
        "step, length 512: prefixkit, checkpointed / PEFT",
        0.5,
        of("memory, deep-llama, batch 2, length 512, P 20", CHECKPOINTED, PEFT),
    ),
    *(
        Criterion(
            "decode",
            f"P {tokens}, batch {batch}: prefixkit / {beside}",
            limit,
            of(DECODE.format(batch, tokens), PREFIXKIT, beside),
        )
        for tokens, batch, beside, limit in (
            (20, 1, PEFT, 1.05),
            (20, 8, PEFT, 1.05),
            (1024, 16, PEFT, 0.5),
            (2048, 32, PEFT, 0.2),
            (2048, 32, BASE, 1.6),
        )
    ),
    Criterion(
        "start", "import prefixkit / import peft", 0.2, of("import, none, batch 1, length 128, P 20", PREFIXKIT, PEFT)
    ),
)


def verdicts(device: str = "cpu") -> Iterator[tuple[Criterion, float | None, float | None]]:
    """Each criterion, with what was measured on that kind of device last, by the clock and by processor time."""
    for criterion in CRITERIA:
        entries = {entry["label"]: entry for entry in results_of(criterion.grid) if entry["device"] == device}
        yield criterion, criterion.measured(entries, "values"), criterion.measured(entries, "processor")


def lines(grid: str | None = None) -> Iterator[str]:
    """A line for each criterion, of one grid or of all; what counts is the clock."""
    for criterion, measured, work in verdicts():
        if grid in {None, criterion.grid}:
            passed = "not measured" if measured is None else "pass" if measured <= criterion.limit else "FAIL"
            value, beside = ("" if one is None else f"{one:.3f}" for one in (measured, work))
            yield f"{passed:<12} {value:>6} ≤ {criterion.limit:<5} (processor {beside:>6})  {criterion.about}"
