"""The outcomes of a sweep as a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from architectures.sweep import Outcome

HEAD = """# Architectures

Made by `nox -s architectures` with transformers {transformers} and torch {torch}.
Every model type that the auto classes of transformers list is built tiny and random from its config class, gets a
prefix, and goes through the core checks of the conformance kit.

| kind | listed | pass |
|---|---|---|
{counts}

What is checked, of every model:

- every key and value of every virtual token gets a gradient;
- disabled, and removed, the model gives the base's outputs to the last bit, and not before;
- a row of a batch equals the row alone.

Of those that generate: the logits of every generated token are those of one forward over the whole text without a
cache, and where both engines can serve the model they give the same outputs.
Of language models and text encoders: a prefix of a prompt's own keys and values gives the outputs of prompt and text
read together, where nothing but attention passes on what the prompt said, and where positions can be moved.

The architectures of the plugins, and some more, pass the [whole kit](conformance.md).
[Engines and limits](engines.md) says what each engine refuses.
"""

KINDS = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders",
    "encoder": "Text encoders",
    "vision": "Images",
    "speech": "Speech",
}
COLUMNS = """
| model type | served by | engine | prefixes | positions | both engines | a prompt as a prefix |
|---|---|---|---|---|---|---|
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole page."""
    kinds = [kind for kind in KINDS if any(outcome.kind == kind for outcome in outcomes)]
    counts = "\n".join(_count(kind, [outcome for outcome in outcomes if outcome.kind == kind]) for kind in kinds)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    parts = [HEAD.format(counts=counts, **versions)]
    for kind in kinds:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        rows = "\n".join(_row(outcome) for outcome in of_kind if outcome.passed)
        reasons = "\n".join(
            f"| `{outcome.model_type}` | {_plain(outcome.reason)} |" for outcome in of_kind if not outcome.passed
        )
        parts.append(f"\n## {KINDS[kind]}\n{COLUMNS}{rows}\n")
        if reasons:
            parts.append(f"\nThe rest:\n\n| model type | why not |\n|---|---|\n{reasons}\n")
    return "".join(parts)


def _count(kind: str, outcomes: Sequence[Outcome]) -> str:
    return f"| {KINDS[kind]} | {len(outcomes)} | {sum(outcome.passed for outcome in outcomes)} |"


def _row(outcome: Outcome) -> str:
    both = _short(outcome.notes.get("engines", ""))
    prompt = _short(outcome.notes.get("prompt", ""))
    positions = {"shift": "moved", "none": "as they are"}[outcome.positions]
    cells = (f"`{outcome.model_type}`", outcome.plugin, outcome.engine, outcome.stacks, positions, both, prompt)
    return f"| {' | '.join(cells)} |"


def _short(note: str) -> str:
    if note.startswith("one engine only"):
        return "one only"
    return note.removeprefix("not applicable: ")


def _plain(reason: str) -> str:
    """A reason that fits a table's cell."""
    return reason.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
