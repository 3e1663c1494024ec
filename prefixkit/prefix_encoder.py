"""The prefix encoder: parameters in, flat prefix out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefixkit.errors import MethodError
from prefixkit.method import PrefixShape

FLAT_STD = 0.02
"""Spread of a flat prefix at the start. N(0, 1), common elsewhere, drowns a frozen model's own
keys; near zero, a prefix starts as a few faint extra tokens."""


class PrefixEncoder(nn.Module):
    """The flat prefix, either as parameters or through an MLP.

    With ``prefix_projection`` it is embedding → linear → tanh → linear (Li & Liang 2021, §4.3);
    without, the embedding is the flat prefix itself (P-tuning v2, Liu et al. 2022, §3.3).

    Args:
        shape: Length and width of the prefix, and the model's hidden size.
        prefix_projection: Whether the MLP stands behind the embedding.
        encoder_hidden_size: Width of the MLP's middle.

    Raises:
        MethodError: If an option has a value of the wrong kind.
    """

    def __init__(self, shape: PrefixShape, *, prefix_projection: bool, encoder_hidden_size: int = 512) -> None:
        super().__init__()
        if not isinstance(prefix_projection, bool):
            raise MethodError(f"prefix_projection is {prefix_projection!r}; it must be True or False")
        if type(encoder_hidden_size) is not int or encoder_hidden_size < 1:
            raise MethodError(f"encoder_hidden_size is {encoder_hidden_size!r}; it must be a whole number of 1 or more")
        rows = shape.num_virtual_tokens
        # Whatever the default dtype: a half-precision prefix does not train.
        dtype = torch.float32
        self.transform: nn.Sequential | None = None
        if not prefix_projection:
            self.embedding = nn.Embedding(rows, shape.width, dtype=dtype)
            nn.init.normal_(self.embedding.weight, std=FLAT_STD)
            return
        self.embedding = nn.Embedding(rows, shape.hidden_size, dtype=dtype)
        self.transform = nn.Sequential(
            nn.Linear(shape.hidden_size, encoder_hidden_size, dtype=dtype),
            nn.Tanh(),
            nn.Linear(encoder_hidden_size, shape.width, dtype=dtype),
        )

    def forward(self) -> torch.Tensor:
        """The flat prefix ``(num_virtual_tokens, width)``."""
        weight = self.embedding.weight
        return weight if self.transform is None else self.transform(weight)

    def start(self, flat: torch.Tensor) -> None:
        """Give ``flat (P, width)`` from now on; through an MLP exactly up to ``P = encoder_hidden_size``.

        The last layer is solved for, by least squares with the smallest weights, and the rest stays random.
        (The 2021 code goes down the squared error instead; this is what it would come to.)
        """
        if self.transform is None:
            self.embedding.weight.copy_(flat)
            return
        last: Any = self.transform[-1]
        middle = self.transform[:-1](self.embedding.weight).double()
        mean = flat.double().mean(dim=0)
        solved = torch.linalg.pinv(middle) @ (flat.double() - mean)
        last.weight.copy_(solved.T)
        last.bias.copy_(mean)


def flat_encoder(flat: torch.Tensor) -> PrefixEncoder:
    """A prefix encoder without MLP that gives ``flat``, on the same device."""
    rows, width = flat.shape
    shape = PrefixShape(num_virtual_tokens=rows, width=width, hidden_size=width)
    encoder = PrefixEncoder(shape, prefix_projection=False).to(flat.device)
    with torch.no_grad():
        encoder.embedding.weight.copy_(flat)
    return encoder
