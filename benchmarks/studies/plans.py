"""What each study runs: arms, learning rates, seeds, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.studies import arms
from benchmarks.studies.arms import Arm
from benchmarks.studies.runs import Run

Planned = Iterator[tuple[Run, Arm]]

INITS = ("tokens", "matched", "zeros", "random")


def sweep(
    study: str,
    task: str,
    named: Mapping[str, Arm],
    rates: Mapping[str, Sequence[float]] | Sequence[float],
    seeds: Sequence[int],
    *,
    rows: int,
    steps: int,
) -> Planned:
    """Every arm with each of its learning rates; all arms with one seed before the next seed."""
    for seed in seeds:
        for name, arm in named.items():
            for rate in rates[name] if isinstance(rates, Mapping) else rates:
                run = Run(study=study, task=task, arm=name, learning_rate=rate, seed=seed, rows=rows, steps=steps)
                yield run, arm


def init_e2e(seeds: Sequence[int]) -> Planned:
    """What a flat prefix starts with, on E2E."""
    named = {init: arms.prefix(init=init) for init in INITS}
    return sweep("init-e2e", "e2e", named, (0.01, 0.03, 0.1, 0.3), seeds, rows=8000, steps=200)


def init_intents(seeds: Sequence[int]) -> Planned:
    """What a flat prefix starts with, on SNIPS intents."""
    named = {init: arms.prefix(init=init) for init in INITS}
    return sweep("init-intents", "snips-intents", named, (0.003, 0.01, 0.03, 0.1), seeds, rows=4000, steps=200)


STUDIES: dict[str, Callable[[Sequence[int]], Planned]] = {
    "init-e2e": init_e2e,
    "init-intents": init_intents,
}
