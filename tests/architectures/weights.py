"""Weights with which attention matters, whatever the architecture's own initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

STD = 0.2


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw all weights anew, large enough that every part of the model has a say in its outputs."""
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.requires_grad or not parameter.numel():
            continue  # fixed tables (sinusoids) are what they are
        if parameter.ndim > 1:
            parameter.normal_(std=_std(parameter))
        elif (parameter == parameter.flatten()[0]).all():
            _spread_constant(parameter)


def _std(parameter: torch.Tensor) -> float:
    if parameter.ndim == 4:  # between convolutions there are activations, not norms, that shrink what passes
        return (2 / parameter[0].numel()) ** 0.5
    # Experts are stacked in front of their matrices, and which way round those are differs.
    inputs = max(parameter.shape[-2:]) if parameter.ndim == 3 else parameter[0].numel()
    return min(STD, inputs**-0.5)


def _spread_constant(parameter: torch.Tensor) -> None:
    """Zeros (biases, gates) become small numbers, layer scales near 0 become near 1; gains of norms stay about 1."""
    value = parameter.flatten()[0].item()
    if value == 0:
        parameter.normal_(std=0.1)
    elif 0 < value <= 1:
        parameter.normal_(mean=1.0, std=0.1)


@torch.no_grad()
def settle(model: nn.Module, inputs: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Let batch norms measure what they get, as training would; else deep stacks of them fade to nothing."""
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    if not norms:
        return
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
        norm.weight.normal_(mean=1.0, std=0.1)  # some begin with gains about 0
    model(**inputs())
    for norm, momentum in zip(norms, usual, strict=True):
        norm.eval().momentum = momentum


@torch.no_grad()
def silence(model: nn.Module, token: int | None) -> None:
    """Make a token (the end of a text) one that is hardly ever the most likely."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if isinstance(token, int) and weight is not None and weight.ndim == 2 and token < len(weight):
        weight[token] = 0.0
        if getattr(head, "bias", None) is not None:
            head.bias[token] = -1.0
