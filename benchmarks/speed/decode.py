"""Greedy decoding by ``generate``, always as many tokens as were asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

import prefixkit
from benchmarks.speed import models
from benchmarks.speed.cells import BASE, COMPILED, NATIVE, PREFIXKIT, STATIC, Cell
from benchmarks.speed.jobs import batch_of, generate
from benchmarks.speed.prefixed import fresh, made
from benchmarks.speed.step import DisagreementError
from benchmarks.speed.timing import Conditions, Contender


def behind(inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """What ``generate`` of the bare model takes with a cache of P tokens: as many ids in front, and mask."""
    front = inputs["input_ids"].new_ones(len(inputs["input_ids"]), tokens)
    return {name: torch.cat([front, value], dim=1) for name, value in inputs.items()}


def contenders(cell: Cell, conditions: Conditions) -> list[Contender]:
    """Everyone's decoding from the same prompt; those with a prefix have to give the same tokens."""
    base = models.make(cell.model, cell.attention, conditions.device, conditions.dtype)
    inputs = batch_of(base, cell, conditions.device)
    del inputs["labels"]
    names = tuple(name for name in cell.contenders if name != NATIVE)
    ready = made({_who(name) for name in names}, base, cell.tokens, trainable=False)
    found = [Contender(name, partial(_run, ready[_who(name)], cell, inputs, _how(name))) for name in names]
    if NATIVE in cell.contenders:
        cache = prefixkit.to_cache(ready[PREFIXKIT], cell.batch)
        run = partial(generate, models.twin(base), cell, behind(inputs, cell.tokens))
        found.append(Contender(NATIVE, run, partial(fresh, cache)))
    check(found)
    return found


def _who(name: str) -> str:
    return name.removesuffix(STATIC).removesuffix(COMPILED)


def _how(name: str) -> dict[str, Any]:
    """What ``generate`` is told besides."""
    if name.endswith(COMPILED):
        everywhere = CompileConfig(mode="default")
        everywhere._compile_all_devices = True  # it would compile on a GPU only
        return {"cache_implementation": "static", "compile_config": everywhere}
    return {"cache_implementation": "static", "disable_compile": True} if name.endswith(STATIC) else {}


def _run(model: Any, cell: Cell, inputs: dict[str, torch.Tensor], options: dict[str, Any], _: Any) -> torch.Tensor:
    return generate(model, cell, inputs, **options)


def check(found: list[Contender]) -> None:
    """All with the prefix generate the same.

    In long runs of a random model two tokens may come so close that rounding decides; the first half has to agree.

    Raises:
        DisagreementError: Otherwise.
    """
    tokens = {one.name: one.run(one.before()) for one in found if _who(one.name) != BASE}
    first = next(iter(tokens.values()))
    half = first.shape[1] // 2
    shares = {name: float((made == first)[:, :half].float().mean()) for name, made in tokens.items()}
    if min(shares.values()) < 0.9:
        raise DisagreementError(f"shares of tokens that are those of {next(iter(tokens))}: {shares}")
