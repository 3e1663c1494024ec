"""One call of a stack, read from its arguments: lengths, mask, and the positions of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prefixkit.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class StackCall:
    """What a stack was called with.

    Attributes:
        batch: Rows.
        queries: Tokens per row in this call.
        past: Real tokens before them in the cache (a tensor with static caches).
        mask: The 2-D mask ``(batch, past + queries)`` of real tokens, or ``None``.
        device: Where the inputs are.
    """

    batch: int
    queries: int
    past: int | torch.Tensor
    mask: torch.Tensor | None
    device: torch.device

    @classmethod
    def read(cls, arguments: dict[str, Any], past: int | torch.Tensor) -> StackCall:
        """Read the arguments of a stack's ``forward``, all given by name.

        Raises:
            EngineError: If neither token ids nor embeddings are given.
        """
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if tokens is None:
            raise EngineError(
                "a stack was called without input_ids and without inputs_embeds; if the model was not, its adapter's "
                "path leads too deep: to the layers, and not to the module that gets the tokens"
            )
        # Some task classes take (batch, choices, tokens) and flatten it themselves.
        queries = tokens.shape[1] if tokens.is_floating_point() else tokens.shape[-1]
        batch = tokens.shape[0] if tokens.is_floating_point() else tokens.numel() // queries
        static = getattr(arguments.get("past_key_values"), "is_compileable", False)
        mask = _two_dimensional(arguments.get("attention_mask"), batch, static=static)
        return cls(batch=batch, queries=queries, past=past, mask=mask, device=tokens.device)

    def token_positions(self) -> torch.Tensor:
        """Positions of the real tokens, counted from 0: ``(batch or 1, queries)``.

        Padding is not counted, as in ``generate``; where the mask is zero the value is a valid
        position without meaning.

        Raises:
            EngineError: If the mask is shorter than the cache and the input together.
        """
        places = torch.arange(self.queries, device=self.device) + self.past
        if self.mask is None:
            return places.unsqueeze(0)
        if isinstance(self.past, int) and self.mask.shape[1] < self.past + self.queries:
            raise EngineError(
                f"attention_mask covers {self.mask.shape[1]} tokens, but cache and input hold "
                f"{self.past} + {self.queries}; pass a mask over all of them"
            )
        counted = self.mask.to(self.device).long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, places]


def _two_dimensional(mask: Any, batch: int, *, static: bool) -> torch.Tensor | None:
    """The mask of real tokens ``(batch, tokens)``, where one can be told."""
    if isinstance(mask, dict):  # generate() prepares one for each kind of layer
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.numel() == batch * mask.shape[-1] and mask.ndim < 4:
        return mask.reshape(batch, -1)
    # With a static cache, generate() hands over a prepared mask: its last query sees every real token.
    if mask.ndim != 4 or not static:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0


def batch_of(arguments: dict[str, Any]) -> int:
    """Rows of a stack's call, whatever it reads: tokens, states, pictures or sound.

    Raises:
        EngineError: If it is given no tensor.
    """
    if any(arguments.get(name) is not None for name in ("input_ids", "inputs_embeds")):
        return StackCall.read(arguments, 0).batch
    first = next((value for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1), None)
    if first is None:
        raise EngineError("a stack was called without any tensor that has rows")
    return first.shape[0]
