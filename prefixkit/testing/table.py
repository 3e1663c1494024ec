"""The page that shows what the conformance tests found: a row for each test, a column for each model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from inspect import getdoc
from itertools import combinations

from prefixkit.testing.conformance import Conformance

RIGHT, RAISES, DEVIATES, SKIPPED = "✓", "raises", "deviates", "not run"
PARTLY, ELSEWHERE = "partly", "–"
CLASS_NAME = re.compile(r"\b[A-Z]\w*[A-Z0-9][a-z]\w*")
LEGEND = f"""\
| cell | meaning |
|:-:|---|
| {RIGHT} | right, under all settings of the test |
| {RAISES} | a clear error instead of wrong numbers; its text stands below the table |
| {PARTLY} | right under some settings, a clear error under the others |
| [number] | a deviation: the test has to fail (a strict xfail), for the reason in the note |
| {SKIPPED} | a package that the test needs was not there |
| {ELSEWHERE} | does not concern the model or the device |
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one test with one set of parameters found.

    Attributes:
        model: The conformance class, without ``Test``.
        test: The name of the test function.
        on_cache: Whether the test is about the cache engine alone.
        settings: The other parameters, as text.
        outcome: :data:`RIGHT`, :data:`RAISES`, :data:`DEVIATES` or :data:`SKIPPED`.
        reason: Of all but the first.
    """

    model: str
    test: str
    on_cache: bool
    settings: dict[str, str]
    outcome: str
    reason: str = ""


def parts() -> dict[type, list[str]]:
    """The parts of the kit and the names of their tests, in order."""
    named = {part: [name for name in vars(part) if name.startswith("test_")] for part in Conformance.__mro__}
    return {part: names for part, names in named.items() if names}


def modes() -> dict[str, str]:
    """What each test of the kit is about: the first line of its docstring, by its name."""
    described = {name: getdoc(vars(part)[name]) or name for part, names in parts().items() for name in names}
    return {name: text.partition("\n")[0].removesuffix(".") for name, text in described.items()}


def page(models: dict[str, type[Conformance]], results: Sequence[Result]) -> str:
    """The page, in Markdown.

    Args:
        models: The conformance classes, by the heads of their columns.
        results: Of all their tests.
    """
    notes: dict[str, int] = {}
    torch, transformers = (version(name).partition("+")[0] for name in ("torch", "transformers"))
    devices = sorted({cls.device.partition(":")[0].upper() for cls in models.values()})
    lines = [
        "# Conformance table",
        "",
        "What the tests of `prefixkit.testing` found: a row for each test, a column for each tiny model.",
        f"Written by `pytest --conformance-table` on {' and '.join(devices)}, with",
        f"torch {torch} and transformers {transformers}.",
        "",
        LEGEND,
        "The last section is about the cache engine. In the others the attention engine holds the prefix.",
        "",
    ]
    with_prefix, cached = (tuple(result for result in results if result.on_cache is on) for on in (False, True))
    for part, names in parts().items():
        table = _table(names, models, with_prefix, notes)
        lines += [f"## {part.__name__}", "", str(getdoc(part)), *table] if table else []
    lines += _refusals(with_prefix, "## What raises")
    table = _table(modes(), models, cached, notes)
    lines += (
        ["## Cache engine", "", "The tests that run with both engines; here with the cache engine.", *table]
        if table
        else []
    )
    lines += _refusals(cached, "### What the cache engine says when it raises")
    return (
        "\n".join([*lines, *_absent(results), *(f"[^{number}]: {text}" for text, number in notes.items())]).rstrip()
        + "\n"
    )


def _absent(results: Sequence[Result]) -> list[str]:
    """The tests of the kit that concern none of the models."""
    names = modes().keys() - {result.test for result in results}
    sentences = [f"- {plain(modes()[name])}" for name in modes() if name in names]
    lead = "These tests of the kit concern none of the models here, or another device."
    return ["## Not part of this run", "", lead, "", *sentences, ""] if sentences else []


def _table(names: Iterable[str], models: Iterable[str], results: Sequence[Result], notes: dict[str, int]) -> list[str]:
    """Lines of the table of these tests; a test without a result is left out, and so is an empty table."""
    rows = []
    for name in names:
        mine = [result for result in results if result.test == name]
        if mine:
            cells = [_cell([result for result in mine if result.model == model], notes) for model in models]
            rows.append([plain(modes()[name]), *cells])
    if not rows:
        return []
    head = [["mode", *models], ["---", *(":-:" for _ in models)]]
    return ["", *(f"| {' | '.join(row)} |" for row in [*head, *rows]), ""]


def _cell(results: Sequence[Result], notes: dict[str, int]) -> str:
    """What stands for one test and one model; a note that is new gets the next number."""
    outcomes = {result.outcome for result in results}
    reasons = {result.reason: None for result in results if result.outcome in {DEVIATES, SKIPPED}}
    if reasons:
        skipped = SKIPPED if SKIPPED in outcomes else ""
        numbers = (notes.setdefault(_note(reason, results), len(notes) + 1) for reason in reasons)
        return skipped + "".join(f"[^{number}]" for number in numbers)
    return PARTLY if len(outcomes) > 1 else "".join(outcomes) or ELSEWHERE


def _note(reason: str, results: Sequence[Result]) -> str:
    """A reason, and the settings that it is about."""
    when = settings_of([result for result in results if result.reason == reason], results)
    return " ".join(f"{reason} (only with {when})".split() if when else reason.split())


def settings_of(some: Sequence[Result], everything: Sequence[Result]) -> str:
    """The fewest settings that tell ``some`` results from ``everything``; empty if they are the same."""
    others = [result.settings for result in everything if result not in some]
    if not others:
        return ""
    mine = [result.settings for result in some]
    for size in range(1, len(mine[0]) + 1):
        for names in combinations(mine[0], size):
            chosen = {tuple(settings[name] for name in names): None for settings in mine}
            if not any(tuple(settings[name] for name in names) in chosen for settings in others):
                pairs = (zip(names, values, strict=True) for values in chosen)
                return " or ".join(", ".join(f"{name} {value}" for name, value in pair) for pair in pairs)
    return "some settings"


def _without_class_names(results: Sequence[Result]) -> list[Result]:
    """The results, with one text for errors of different models that name different classes and are else the same."""
    raised = [result for result in results if result.outcome == RAISES]
    by_model: dict[tuple[str, str], set[str]] = {}
    by_shape: dict[str, set[str]] = {}
    for result in raised:
        shape = CLASS_NAME.sub("…", result.reason)
        by_model.setdefault((shape, result.model), set()).add(result.reason)
        by_shape.setdefault(shape, set()).add(result.reason)
    told_apart = {shape for (shape, _), texts in by_model.items() if len(texts) > 1}
    one_for = {
        text: shape for shape, texts in by_shape.items() for text in texts if len(texts) > 1 and shape not in told_apart
    }
    return [replace(result, reason=one_for.get(result.reason, result.reason)) for result in results]


def _refusals(results: Sequence[Result], heading: str) -> list[str]:
    """Each text of an error, with the tests and models that met it."""
    results = _without_class_names(results)
    texts = {result.reason: None for result in results if result.outcome == RAISES}
    lines = [heading, ""] if texts else []
    for text in texts:
        lines += [f"“{plain(text)}”", ""]
        for name, sentence in modes().items():
            found = "; ".join(_who(name, text, results))
            lines += [f"- {plain(sentence)}: {found}"] if found else []
        lines += [""]
    return lines


def _who(name: str, text: str, results: Sequence[Result]) -> Iterator[str]:
    """The models whose test met the error, those with equal settings together."""
    together: dict[str, list[str]] = {}
    mine = [result for result in results if result.test == name]
    for model in {result.model: None for result in mine}:
        of_model = [result for result in mine if result.model == model]
        found = [result for result in of_model if result.reason == text and result.outcome == RAISES]
        if found:
            together.setdefault(settings_of(found, of_model), []).append(model)
    everyone = {result.model for result in mine}
    for when, names in together.items():
        who = "all models" if everyone == set(names) else ", ".join(names)
        yield f"{who} with {when}" if when else who


def plain(text: str) -> str:
    """The text on one line, without what Markdown would take for mark-up."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
