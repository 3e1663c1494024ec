"""Prefix encoders: parameters in, flat prefix out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prefixkit.errors import MethodError
from prefixkit.method import PrefixShape

FLAT_STD = 0.02
"""Spread of a flat prefix with ``init="random"``. N(0, 1), common elsewhere, drowns a frozen model's own
keys; near zero, a prefix starts as a few faint extra tokens."""


class PrefixEncoder(nn.Module):
    """The flat prefix, either as parameters or through an MLP.

    With ``prefix_projection`` it is embedding → linear → tanh → linear (Li & Liang 2021, §4.3);
    without, the embedding is the flat prefix itself (P-tuning v2, Liu et al. 2022, §3.3).

    Args:
        shape: Length and width of the prefix, and the model's hidden size.
        prefix_projection: Whether the MLP stands behind the embedding.
        encoder_hidden_size: Width of the MLP's middle.
        share_key_value: Whether a virtual token's key and value are one vector (the simple shared structure of
            Le et al. 2025, arXiv 2410.02200).

    Raises:
        MethodError: If an option has a value of the wrong kind, or keys and values differ in size and cannot be
            shared.
    """

    columns: torch.Tensor | None

    def __init__(
        self,
        shape: PrefixShape,
        *,
        prefix_projection: bool,
        encoder_hidden_size: int = 512,
        share_key_value: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("prefix_projection", prefix_projection), ("share_key_value", share_key_value)):
            if not isinstance(value, bool):
                raise MethodError(f"{name} is {value!r}; it must be True or False")
        if type(encoder_hidden_size) is not int or encoder_hidden_size < 1:
            raise MethodError(f"encoder_hidden_size is {encoder_hidden_size!r}; it must be a whole number of 1 or more")
        rows = shape.num_virtual_tokens
        # Whatever the default dtype: a half-precision prefix does not train.
        dtype = torch.float32
        columns = _shared_columns(shape.halves) if share_key_value else None
        self.register_buffer("columns", columns, persistent=False)
        width = shape.width if columns is None else int(columns.max()) + 1
        self.transform: nn.Sequential | None = None
        if not prefix_projection:
            self.embedding: nn.Embedding = nn.Embedding(rows, width, dtype=dtype)
            nn.init.normal_(self.embedding.weight, std=FLAT_STD)
            return
        self.embedding = nn.Embedding(rows, shape.hidden_size, dtype=dtype)
        self.transform = nn.Sequential(
            nn.Linear(shape.hidden_size, encoder_hidden_size, dtype=dtype),
            nn.Tanh(),
            nn.Linear(encoder_hidden_size, width, dtype=dtype),
        )

    @property
    def is_flat(self) -> bool:
        """Whether its one parameter is the flat prefix."""
        return self.transform is None and self.columns is None

    def forward(self) -> torch.Tensor:
        """The flat prefix ``(num_virtual_tokens, width)``."""
        weight: torch.Tensor = self.embedding.weight
        own = weight if self.transform is None else self.transform(weight)
        return own if self.columns is None else own[:, self.columns]

    def start(self, flat: torch.Tensor) -> None:
        """Give ``flat (P, width)`` from now on; through an MLP exactly up to ``P = encoder_hidden_size``.

        The last layer is solved for, by least squares with the smallest weights, and the rest stays random.
        (The 2021 code goes down the squared error instead; this is what it would come to.) A shared vector
        starts halfway between the key and the value that are asked for.
        """
        own = flat if self.columns is None else _means(flat, self.columns)
        if self.transform is None:
            self.embedding.weight.copy_(own)
            return
        last: Any = self.transform[-1]
        # On the CPU, since not every device has float64.
        middle, own = (part.cpu().double() for part in (self.transform[:-1](self.embedding.weight), own))
        mean = own.mean(dim=0)
        solved = torch.linalg.pinv(middle) @ (own - mean)
        last.weight.copy_(solved.T)
        last.bias.copy_(mean)


def _shared_columns(halves: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which of its own numbers each column of the flat prefix is, where key and value are one."""
    columns: list[torch.Tensor] = []
    first = 0
    for key, value in halves:
        if key != value:
            raise MethodError(
                f"share_key_value=True needs keys and values of one size; here they have {key} and {value}"
            )
        columns += [torch.arange(first, first + key)] * 2
        first += key
    return torch.cat(columns)


def _means(flat: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Each number of its own as the mean of the columns that it stands in."""
    own = flat.new_zeros(len(flat), int(columns.max()) + 1)
    return own.index_add(1, columns, flat / 2)


class VirtualTokens(nn.Module):
    """Input embeddings of virtual tokens, ``(num_virtual_tokens, embedding_size)`` (prompt tuning).

    Args:
        shape: Length of the prefix and size of the model's embeddings.
    """

    def __init__(self, shape: PrefixShape) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(shape.num_virtual_tokens, shape.embedding_size, dtype=torch.float32)
        nn.init.normal_(self.embedding.weight, std=FLAT_STD)

    def forward(self) -> torch.Tensor:
        """The embeddings."""
        return self.embedding.weight

    def start(self, embeddings: torch.Tensor) -> None:
        """Give these from now on."""
        self.embedding.weight.copy_(embeddings)


class Memory(nn.Module):
    """The matrices of a prefix memory, all in one row; empty at the start.

    Args:
        shape: How many numbers they have.
    """

    def __init__(self, shape: PrefixShape) -> None:
        super().__init__()
        self.matrices: nn.Parameter = nn.Parameter(torch.zeros(1, shape.memory_size, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """``(1, memory_size)``."""
        return self.matrices


def flat_encoder(flat: torch.Tensor) -> PrefixEncoder:
    """A prefix encoder without MLP that gives ``flat``, on the same device."""
    rows, width = flat.shape
    shape = PrefixShape(num_virtual_tokens=rows, width=width, hidden_size=width)
    encoder = PrefixEncoder(shape, prefix_projection=False).to(flat.device)
    with torch.no_grad():
        encoder.embedding.weight.copy_(flat)
    return encoder
