"""The sweep of record: every model type tiny, with a prefix, through the core checks.

Example:
    python tests/architectures/sweep.py --kind causal
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import prefixkit
from architectures import checks
from architectures.page import page
from architectures.tiny_models import KINDS, CannotBuild, TinyModel, build, model_types


@dataclass
class Outcome:
    """What became of one model type.

    Attributes:
        passed: Whether every check holds that concerns its kind.
        reason: Why not.
        notes: What each check said.
    """

    kind: str
    model_type: str
    passed: bool = False
    reason: str = ""
    engine: str = ""
    positions: str = ""
    stacks: str = ""
    plugin: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def examine(kind: str, model_type: str) -> Outcome:
    """Build, apply, check."""
    outcome, started = Outcome(kind, model_type), time.perf_counter()
    try:
        tiny = build(kind, model_type)
        _describe(outcome, tiny)
        dense = _dense(kind, model_type, tiny)
        for name, check in _checks(kind, outcome):
            outcome.notes[name] = check(tiny if name in WITH_THE_DEFAULT else dense)
        outcome.passed = True
    except CannotBuild as error:
        outcome.reason = f"not built: {error}"
    except (prefixkit.PrefixkitError, checks.Failed) as error:
        outcome.reason = f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - one type must not stop the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome.reason = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
    if not outcome.passed and kind in ("causal", "seq2seq") and outcome.stacks:
        outcome.reason += _of_the_bare_model(kind, model_type)
    outcome.seconds = time.perf_counter() - started
    return outcome


WITH_THE_DEFAULT = ("gradients", "disabled", "rows")
SPARSE = ("index_topk", "attention_chunk_size", "keep_window_size")
"""Settings that let a query see few keys. Some choose them by scores that are often equal in a random model, and a
prompt is not always among them, as a pinned prefix is: the numbers are compared where all are in sight."""


def _dense(kind: str, model_type: str, tiny: TinyModel) -> TinyModel:
    """The model with every key in sight, if it has a setting for that."""
    text = tiny.model.config.get_text_config()
    changes = {name: 64 for name in SPARSE if getattr(text, name, None)}
    if not changes:
        return tiny
    dense = build(kind, model_type, **changes)
    if any(getattr(dense.model.config.get_text_config(), name) != 64 for name in changes):  # a config of parts
        dense = build(kind, model_type, text_config=changes)
    return dense


def _checks(kind: str, outcome: Outcome) -> Iterable[tuple[str, Any]]:
    yield "gradients", checks.slots_get_gradients
    yield "disabled", checks.disabled_is_the_base
    yield "rows", checks.rows_are_apart
    if kind in ("causal", "seq2seq"):
        yield "generation", checks.generation_is_recomputation
        yield "engines", checks.engines_agree
    if kind in ("causal", "encoder") and outcome.engine == "attention":
        yield "prompt", checks.prompt_is_a_prefix


def _describe(outcome: Outcome, tiny: TinyModel) -> None:
    model = checks.with_prefix(tiny)
    config = prefixkit.config(model)
    outcome.engine = model.__dict__["_prefixkit"].attachment.engine.name
    outcome.positions = config.positions
    outcome.stacks = ", ".join(dict.fromkeys(site.stack for site in config.sites))
    outcome.plugin = next(
        (plugin.distribution for plugin in prefixkit.plugins() if config.model_type in plugin.model_types), "generic"
    )


def _of_the_bare_model(kind: str, model_type: str) -> str:
    """Whether the bare model fails in generation too."""
    try:
        checks.bare_generation_is_recomputation(build(kind, model_type))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not the prefix's doing
        return f" [the bare model: {type(error).__name__}: {str(error)[:120]}]"
    return ""


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def sweep(kinds: Iterable[str], only: str | None, processes: int) -> list[Outcome]:
    """The outcomes, in order."""
    wanted = [(kind, name) for kind in kinds for name in model_types(kind) if only in (None, name)]
    with ProcessPoolExecutor(processes, initializer=_quiet) as pool:
        outcomes = []
        for outcome in pool.map(examine, *zip(*wanted, strict=True)):
            outcomes.append(outcome)
            mark = "passes" if outcome.passed else outcome.reason
            print(f"{outcome.kind} {outcome.model_type}: {mark}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--type", help="one model type only")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    parser.add_argument("--page", type=Path, help="write them there as a page of the documentation")
    options = parser.parse_args()
    outcomes = sweep(options.kind or KINDS, options.type, options.processes)
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    if options.page:
        options.page.write_text(page(outcomes), encoding="utf-8")
    for kind in options.kind or KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        print(f"{kind}: {sum(outcome.passed for outcome in of_kind)} of {len(of_kind)} pass")


if __name__ == "__main__":
    main()
