"""Tables and plots of what the studies found."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.studies.runs import results_of

PLOTS = Path(__file__).parents[2] / "docs/_static/studies"
Entries = list[dict[str, Any]]


def by_rate(entries: Iterable[dict[str, Any]]) -> dict[str, dict[float, Entries]]:
    """Results by arm and learning rate, in the order of the plan."""
    found: dict[str, dict[float, Entries]] = {}
    for entry in entries:
        found.setdefault(entry["arm"], {}).setdefault(entry["learning_rate"], []).append(entry)
    return found


def mean_and_spread(entries: Entries, what: str = "score") -> tuple[float, float]:
    """Mean and standard deviation over the seeds; the latter is 0 for one."""
    values = [float(entry[what]) for entry in entries]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def best_rate(rates: dict[float, Entries]) -> float:
    """The learning rate with the best mean score."""
    return max(rates, key=lambda rate: mean_and_spread(rates[rate])[0])


def table(study: str) -> str:
    """A Markdown table: each arm at the best of its learning rates."""
    lines = [
        "| arm | trained numbers | best learning rate (of) | score | test loss | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rates in by_rate(results_of(study)).items():
        rate = best_rate(rates)
        entries = rates[rate]
        score, spread = mean_and_spread(entries)
        loss, _ = mean_and_spread(entries, "test_loss")
        shown = f"{score:.1f} ± {spread:.1f}" if len(entries) > 1 else f"{score:.1f}"
        tried = ", ".join(f"{one:g}" for one in rates)
        lines.append(
            f"| {arm} | {entries[0]['trained_numbers']:,} | {rate:g} ({tried}) | {shown} "
            f"| {loss:.3f} | {len(entries)} |"
        )
    return "\n".join(lines)


def plot(study: str) -> Path:
    """Score against learning rate, a line for each arm; where there is one rate, against the arms."""
    arms = by_rate(results_of(study))
    figure, axes = plt.subplots(figsize=(6.4, 4))
    if all(len(rates) == 1 for rates in arms.values()):
        pairs = [mean_and_spread(next(iter(rates.values()))) for rates in arms.values()]
        axes.errorbar(list(arms), [mean for mean, _ in pairs], yerr=[spread for _, spread in pairs], marker="o")
        axes.set_xlabel("virtual tokens")
    else:
        for arm, rates in arms.items():
            pairs = [mean_and_spread(entries) for entries in rates.values()]
            axes.errorbar(
                list(rates), [mean for mean, _ in pairs], yerr=[spread for _, spread in pairs], marker="o", label=arm
            )
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.legend(fontsize="small")
    axes.set_ylabel("score")
    axes.set_title(study)
    figure.tight_layout()
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / f"{study}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
