"""First virtual tokens that do not train.

A model looks at its first token much, whatever it is (an attention sink); in a prefix that starts from real
tokens it can stay what it was, as in Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266).
"""

from __future__ import annotations

import torch
from torch import nn

from prefixkit.errors import MethodError

FROZEN = "frozen"
"""The buffer's name in the prefix encoder: the first rows of what it gives."""


def add_frozen(encoder: nn.Module, tokens: int) -> None:
    """Keep the first ``tokens`` rows that the prefix encoder gives now.

    Raises:
        MethodError: If it has something else by that name.
    """
    if hasattr(encoder, FROZEN):
        raise MethodError(
            f"the prefix encoder {type(encoder).__name__} has a {FROZEN!r} of its own; use num_frozen_tokens=0"
        )
    with torch.no_grad():
        encoder.register_buffer(FROZEN, encoder()[:tokens].clone())


def keep_frozen(encoder: nn.Module) -> None:
    """Take the rows that the prefix encoder gives now for those that stay."""
    frozen = encoder.get_buffer(FROZEN)
    with torch.no_grad():
        frozen.copy_(encoder()[: len(frozen)])


def with_frozen(encoder: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """What the prefix encoder gave, ``(P, …)``, with the rows that stay in place of the first."""
    frozen = encoder.get_buffer(FROZEN)
    return torch.cat([frozen.to(given), given[len(frozen) :]])
