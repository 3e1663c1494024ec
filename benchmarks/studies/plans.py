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


def arms_e2e(seeds: Sequence[int]) -> Planned:
    """A prefix against other ways to train the small GPT-2 on E2E, each with learning rates of its own."""
    named = {
        "p-tuning-v2": arms.prefix(),
        "prefix-tuning (MLP)": arms.prefix("prefix-tuning"),
        "embedding-only": arms.prefix("prompt-tuning"),
        "prefix memory": arms.prefix("prefix-memory", tokens=1, positions="none"),
        "LoRA, equal budget": arms.lora(10, ["c_attn"]),
        "top layer": arms.top_layers(1),
        "full fine-tuning": arms.full,
    }
    rates = {
        "p-tuning-v2": (0.03, 0.1, 0.3),
        "prefix-tuning (MLP)": (0.0003, 0.001, 0.003, 0.01),
        "embedding-only": (0.03, 0.1, 0.3),
        "prefix memory": (0.001, 0.003, 0.01),
        "LoRA, equal budget": (0.003, 0.01, 0.03),
        "top layer": (0.001, 0.003),
        "full fine-tuning": (0.0005, 0.001, 0.002),
    }
    return sweep("arms-e2e", "e2e", named, rates, seeds, rows=8000, steps=200)


def length_e2e(seeds: Sequence[int]) -> Planned:
    """How long the prefix is, on E2E."""
    named = {f"{tokens}": arms.prefix(tokens=tokens) for tokens in (1, 5, 10, 20, 50, 100)}
    return sweep("length-e2e", "e2e", named, (0.1,), seeds, rows=8000, steps=200)


def arms_intents(seeds: Sequence[int]) -> Planned:
    """A prefix against a linear probe and full fine-tuning, on SNIPS intents."""
    named = {"p-tuning-v2": arms.prefix(), "linear probe": arms.probe, "full fine-tuning": arms.full}
    rates = {
        "p-tuning-v2": (0.01, 0.03, 0.1),
        "linear probe": (0.003, 0.01, 0.03),
        "full fine-tuning": (0.0001, 0.0003, 0.001),
    }
    return sweep("arms-intents", "snips-intents", named, rates, seeds, rows=13084, steps=400)


STUDIES: dict[str, Callable[[Sequence[int]], Planned]] = {
    "init-e2e": init_e2e,
    "init-intents": init_intents,
    "arms-e2e": arms_e2e,
    "length-e2e": length_e2e,
    "arms-intents": arms_intents,
}
