"""Folding: what an MLP of another library makes of its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import torch
from torch.nn import functional

from prefixkit.formats.found import Target, tensor


def fold(
    target: Target,
    tensors: Mapping[str, object],
    *,
    embedding: str,
    trans: str,
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.tanh,
) -> tuple[torch.Tensor, set[str]]:
    """The flat prefix ``(P, width)``, and the names of all tensors that have a part in it.

    Args:
        target: Names the file in messages.
        tensors: Of the file.
        embedding: Name of the embeddings of the virtual tokens, ``(P, dim)``.
        trans: Name of the ``Sequential``: linear layers 0, 2, and perhaps more, with activations between.
        activation: What stands between them.

    Raises:
        CheckpointError: If one is missing, or two do not fit together.
    """
    states = tensor(target, tensors, embedding, 2)
    names = {embedding}
    for index in count(0, 2):
        weight, bias = f"{trans}.{index}.weight", f"{trans}.{index}.bias"
        if index and weight not in tensors:
            break
        matrix, offset = tensor(target, tensors, weight, 2), tensor(target, tensors, bias, 1)
        if matrix.shape != (len(offset), states.shape[1]):
            raise target.damaged(
                f"{weight!r} is {tuple(matrix.shape)}, {bias!r} is {tuple(offset.shape)}, and what comes to it has "
                f"{states.shape[1]} numbers; these do not fit together"
            )
        states = functional.linear(activation(states) if index else states, matrix, offset)
        names |= {weight, bias}
    return states, names
