"""What each study runs: arms, learning rates, seeds, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.studies import arms
from benchmarks.studies.arms import Arm
from benchmarks.studies.findings import best_rate, results_of
from benchmarks.studies.runs import Run

Planned = Iterator[tuple[Run, Arm]]

FLAT = (0.01, 0.03, 0.1, 0.3)
"""Learning rates of a flat prefix."""

MLP = (0.0003, 0.0005, 0.001, 0.003)
"""Learning rates of an MLP that makes the prefix."""

RECOMMENDED_MLP = (0.0005,)
"""What :func:`prefixkit.recommended_lr` says of an MLP."""

AROUND = (0.03, 0.1)
"""What it says of a flat prefix, and one below: for studies that vary something else."""


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        plan: The runs, given the seeds.
        x: What its plot has on the horizontal axis: a field of :class:`Run`.
        label: What to call it there.
    """

    plan: Callable[[Sequence[int]], Planned]
    x: str = "learning_rate"
    label: str = "learning rate"


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
    """Every arm with each of its learning rates in the first seed, and with the best of them in the others."""
    for seed in seeds:
        for name, arm in named.items():
            tried = rates[name] if isinstance(rates, Mapping) else rates
            if seed != seeds[0]:
                tried = [_best(study, task, name, rows)]
            for rate in tried:
                run = Run(study=study, task=task, arm=name, learning_rate=rate, seed=seed, rows=rows, steps=steps)
                yield run, arm


def _best(study: str, task: str, arm: str, rows: int) -> float:
    """The best learning rate so far; a plan is read as its runs end, so that the first seed has been through."""
    found: dict[float, list[dict[str, object]]] = {}
    for entry in results_of(study):
        if (entry["task"], entry["arm"], entry["rows"]) == (task, arm, rows):
            found.setdefault(entry["learning_rate"], []).append(entry)
    return best_rate(found)


def init_e2e(seeds: Sequence[int]) -> Planned:
    """What a flat prefix starts with, on E2E."""
    named = {init: arms.prefix(init=init) for init in arms.INITS}
    return sweep("init-e2e", "e2e", named, FLAT, seeds, rows=8000, steps=200)


def init_few(seeds: Sequence[int]) -> Planned:
    """What a flat prefix starts with when there are few rows, on E2E; and full fine-tuning beside it."""
    named = {init: arms.prefix(init=init) for init in arms.INITS} | {"a solved table": arms.from_a_solved_table}
    everything = named | {"full fine-tuning": arms.full}
    for rows in (50, 100, 500):
        rates = dict.fromkeys(named, (0.01, *AROUND) if rows == 50 else AROUND)
        rates["full fine-tuning"] = (0.0002, 0.0005, 0.001)
        yield from sweep("init-few", "e2e", everything, rates, seeds, rows=rows, steps=100)


def arms_e2e(seeds: Sequence[int]) -> Planned:
    """A prefix against other ways to train the small GPT-2 on E2E, each with learning rates of its own."""
    yield from sweep("arms-e2e", "e2e", {"base": arms.full}, (0.0,), seeds[:1], rows=8000, steps=0)
    named = {
        "p-tuning-v2": arms.prefix(),
        "prefix-tuning (MLP)": arms.prefix("prefix-tuning"),
        "embedding-only": arms.prefix("prompt-tuning"),
        "infix": arms.prefix(infix=True),
        "prefix memory": arms.prefix("prefix-memory", tokens=1, positions="none"),
        "LoRA, equal budget": arms.lora(10, ["c_attn"]),
        "top layer": arms.top_layers(1),
        "full fine-tuning": arms.full,
    }
    rates = {
        "p-tuning-v2": (0.03, 0.1, 0.3),
        "prefix-tuning (MLP)": MLP,
        "embedding-only": (0.03, 0.1, 0.3),
        "infix": (0.03, 0.1, 0.3),
        "prefix memory": (0.001, 0.003, 0.01),
        "LoRA, equal budget": (0.003, 0.01, 0.03),
        "top layer": (0.001, 0.003, 0.01),
        "full fine-tuning": (0.0005, 0.001, 0.002),
    }
    yield from sweep("arms-e2e", "e2e", named, rates, seeds, rows=8000, steps=200)


def length_e2e(seeds: Sequence[int]) -> Planned:
    """How long the prefix is, on E2E; a long one pushes the text out of the 128 positions of the base's pretraining.

    With the text at position 0 there are still more keys than it has seen there; a gated prefix is not among them.
    """
    named = {f"{tokens}": arms.prefix(tokens=tokens) for tokens in (1, 5, 10, 20, 50, 100)}
    named |= {f"{tokens}, text at 0": arms.prefix(tokens=tokens, positions="none") for tokens in (20, 50, 100)}
    named |= {f"{tokens}, gate": arms.prefix(tokens=tokens, positions="none", gate=True) for tokens in (20, 100)}
    return sweep("length-e2e", "e2e", named, AROUND, seeds, rows=8000, steps=200)


def arms_intents(seeds: Sequence[int]) -> Planned:
    """A prefix against a linear probe and full fine-tuning, on SNIPS intents."""
    named = {"p-tuning-v2": arms.prefix(), "linear probe": arms.probe, "full fine-tuning": arms.full}
    rates = {
        "p-tuning-v2": FLAT,
        "linear probe": (0.003, 0.01, 0.03, 0.1),
        "full fine-tuning": (0.0001, 0.0003, 0.001),
    }
    return sweep("arms-intents", "snips-intents", named, rates, seeds, rows=13084, steps=400)


def arms_intents_long(seeds: Sequence[int]) -> Planned:
    """A prefix against full fine-tuning in two passes over SNIPS intents, at the rates that were best in one."""
    named = {"p-tuning-v2": arms.prefix(), "full fine-tuning": arms.full}
    rates = {"p-tuning-v2": (0.03,), "full fine-tuning": (0.0003,)}
    return sweep("arms-intents-long", "snips-intents", named, rates, seeds, rows=13084, steps=800)


ENCODER_TASKS = {"snips-intents": 13084, "snips-slots": 13084, "wnut17": 3394}
"""Tasks of the small BERT, and how many rows they train on."""


def mlp_encoder(seeds: Sequence[int]) -> Planned:
    """A flat prefix against one that an MLP makes, on SNIPS with the small BERT."""
    mlp, (rate,) = arms.prefix("prefix-tuning"), RECOMMENDED_MLP
    for seed in seeds:
        own = Run(
            study="mlp-encoder",
            task="snips-slots",
            arm="MLP, head at 0.1",
            learning_rate=rate,
            seed=seed,
            rows=ENCODER_TASKS["snips-slots"],
            steps=200,
            head_rate=0.1,
        )
        yield own, mlp
    named = {"flat": arms.prefix(), "MLP": mlp, "MLP, recommended rate": mlp}
    rates = {"flat": FLAT, "MLP": MLP, "MLP, recommended rate": RECOMMENDED_MLP}
    for task in ("snips-intents", "snips-slots"):
        yield from sweep("mlp-encoder", task, named, rates, seeds, rows=ENCODER_TASKS[task], steps=200)


def length_encoder(seeds: Sequence[int]) -> Planned:
    """How long the prefix is, on the small BERT."""
    named = {f"{tokens}": arms.prefix(tokens=tokens) for tokens in (1, 20, 100)}
    for task, rows in ENCODER_TASKS.items():
        yield from sweep("length-encoder", task, named, AROUND, seeds, rows=rows, steps=200)


def depth_encoder(seeds: Sequence[int]) -> Planned:
    """Which of the small BERT's six layers carry the prefix."""
    spans = {"1 to 3": [0, 1, 2], "1 to 6": None, "4 to 6": [3, 4, 5]}
    named = {span: arms.prefix(layers=layers) for span, layers in spans.items()}
    for task, rows in ENCODER_TASKS.items():
        yield from sweep("depth-encoder", task, named, AROUND, seeds, rows=rows, steps=200)


STUDIES = {
    "init-e2e": Study(init_e2e),
    "init-few": Study(init_few, "rows", "training rows"),
    "arms-e2e": Study(arms_e2e),
    "arms-intents": Study(arms_intents),
    "arms-intents-long": Study(arms_intents_long),
    "mlp-encoder": Study(mlp_encoder),
    "length-e2e": Study(length_e2e, "arm", "virtual tokens"),
    "length-encoder": Study(length_encoder, "arm", "virtual tokens"),
    "depth-encoder": Study(depth_encoder, "arm", "layers with a prefix"),
}
