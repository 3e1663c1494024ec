"""A training step: forward with labels, backward to all that trains; no optimizer, and dropout nowhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.speed import models
from benchmarks.speed.cells import BASE, CACHE_ENGINE, PEFT, PEFT_MLP, PREFIXKIT, PREFIXKIT_MLP, Cell
from benchmarks.speed.jobs import batch_of, forget, step, step_to_embeddings
from benchmarks.speed.prefixed import made
from benchmarks.speed.timing import Conditions, Contender

PAIRS = ((PREFIXKIT, PEFT), (CACHE_ENGINE, PREFIXKIT), (PREFIXKIT_MLP, PEFT_MLP))
"""Who has to give the same numbers."""


class DisagreementError(AssertionError):
    """Two contenders do not do the same."""


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """What trains in a model."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def contenders(cell: Cell, conditions: Conditions) -> list[Contender]:
    """Everyone's step on the same weights and the same batch, after a look at what comes out of it."""
    base = models.make(cell.model, cell.attention, conditions.device, conditions.dtype)
    batch = batch_of(base, cell, conditions.device)
    ready = made(cell.contenders, base, cell.tokens, trainable=True)
    check(ready, batch)
    runs = {name: step_to_embeddings if name == BASE else step for name in ready}
    return [Contender(name, partial(runs[name], model, batch), partial(forget, model)) for name, model in ready.items()]


def check(ready: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    """The same logits, and gradients for every number that trains, of the same size.

    Raises:
        DisagreementError: Otherwise.
    """
    for name, model in ready.items():
        if name != BASE:
            check_gradients(name, model, batch)
    for mine, other in PAIRS:
        if {mine, other} <= ready.keys():
            check_pair(mine, other, ready, batch)
    for model in ready.values():
        forget(model)


def check_gradients(name: str, model: Any, batch: dict[str, torch.Tensor]) -> None:
    """One step leaves a gradient in everything that trains, and nothing else does."""
    step(model, batch)
    without = [weight for weight, value in trained(model).items() if value.grad is None or not value.grad.any()]
    if without or not trained(model):
        raise DisagreementError(f"{name} has no gradient for {without or 'anything'}")


def check_pair(mine: str, other: str, ready: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    """Two models agree in logits and in the norm of each gradient, as far as their dtype goes."""
    with torch.no_grad():
        first, second = (ready[name](**batch).logits.float() for name in (mine, other))
    half = next(ready[mine].parameters()).dtype == torch.bfloat16
    tolerance = 0.05 if half else 1e-3
    if not torch.allclose(first, second, atol=tolerance * float(second.abs().max()), rtol=0):
        raise DisagreementError(f"{mine} and {other} differ by {float((first - second).abs().max()):.2g} in logits")
    if first.shape[-1] and not ready[mine].config.is_encoder_decoder:  # PEFT ties layers of T5 together
        norms = [[float(value.grad.norm()) for value in trained(ready[name]).values()] for name in (mine, other)]
        pairs = zip(sorted(norms[0]), sorted(norms[1]), strict=True)
        if any(abs(one - two) > (0.2 if half else 0.01) * two for one, two in pairs):
            raise DisagreementError(f"norms of gradients differ: {mine} {norms[0]}, {other} {norms[1]}")
