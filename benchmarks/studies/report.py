"""Tables and plots of what the studies found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.studies.findings import Entry, at_best_rate, best_rate, groups, mean_and_spread, results_of
from benchmarks.studies.plans import STUDIES

SCORES = {"e2e": "BLEU", "snips-intents": "accuracy", "snips-slots": "F1", "wnut17": "F1"}
PLOTS = Path(__file__).parents[2] / "docs/_static/studies"


def shown(entries: list[Entry], what: str, digits: int) -> str:
    """Mean and spread over the seeds, or nothing where it was not measured."""
    if any(entry.get(what) is None for entry in entries):
        return ""
    mean, spread = mean_and_spread(entries, what)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(entries) > 1 else f"{mean:.{digits}f}"


def table(study: str) -> str:
    """A Markdown table: each arm at the best of its learning rates, with what it had at the first rate's seeds."""
    lines = [
        "| arm | trained numbers | best learning rate (of) | score | test loss | loss on other text | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rates in groups(results_of(study)).items():
        rate = best_rate(rates)
        entries = rates[rate]
        tried = ", ".join(f"{one:g}" for one in sorted(rates))
        lines.append(
            f"| {arm} | {entries[0]['trained_numbers']:,} | {rate:g} ({tried}) | {shown(entries, 'score', 1)} "
            f"| {shown(entries, 'test_loss', 3)} | {shown(entries, 'other_loss', 3)} | {len(entries)} |"
        )
    return "\n".join(lines)


def points(study: str) -> dict[str, tuple[list[Any], list[float], list[float]]]:
    """For each line of the plot its x, and mean and spread of the scores; at the best rates, unless x is the rate."""
    found, x = {}, STUDIES[study].x
    entries = results_of(study) if x == "learning_rate" else at_best_rate(results_of(study))
    for variant, own in variants(entries, x).items():
        for line, by_x in groups(own, x).items():
            places = sorted(by_x, key=lambda place: (float(place), "") if _is_number(place) else (0.0, place))
            pairs = [mean_and_spread(by_x[place]) for place in places]
            name = ", ".join(filter(None, (line, variant)))
            found[name] = (places, [mean for mean, _ in pairs], [spread for _, spread in pairs])
    return found


def _is_number(place: object) -> bool:
    return not isinstance(place, str) or place.isdecimal()


def variants(entries: list[Entry], x: str) -> dict[str, list[Entry]]:
    """Where the arm is the axis, it stands there by its name before the comma; each variant behind it is a line."""
    if x != "arm":
        return {"": entries}
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        place, _, variant = entry["arm"].partition(", ")
        found.setdefault(variant, []).append({**entry, "arm": place})
    return found


def plot(study: str) -> Path:
    """Score against learning rate, or what else the study varies; bars are standard deviations over seeds."""
    figure, axes = plt.subplots(figsize=(5.4, 4.4), layout="constrained")  # its letters can be read on a telephone
    for line, (x, mean, spread) in points(study).items():
        axes.errorbar(x, mean, yerr=spread, marker="o", capsize=3, label=line)
    if STUDIES[study].x != "arm":
        axes.set_xscale("log")
    axes.set_xlabel(STUDIES[study].label)
    axes.set_ylabel(" or ".join(sorted({SCORES[entry["task"]] for entry in results_of(study)})))
    axes.set_title(study)
    figure.legend(loc="outside lower center", ncols=2, fontsize="medium")
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / f"{study}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
