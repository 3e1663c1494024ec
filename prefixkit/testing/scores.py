"""Attention scores of a bare model that takes no mask of ours, read and changed on their way to the softmax."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prefixkit.testing.subject import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOFTMAX = (torch.softmax, torch.Tensor.softmax, functional.softmax)


class ChangedScores(TorchFunctionMode):
    """Inside, the prompt in front of a text is in sight of all of it, or at no distance from it.

    Args:
        length: Tokens of prompt and text: what is ``(..., length, length)`` are scores or their masks.
        bias: The model's own bias, ``(batch, heads, length, length)``; that of the prompt's columns is taken
            away. ``None``: it stays.
        pinned: Whether no window hides the prompt. A window is a condition of ``torch.where``.

    Attributes:
        found: The scores that came by, as they were.
    """

    def __init__(self, length: int, *, bias: torch.Tensor | None = None, pinned: bool = False) -> None:
        super().__init__()
        self.length = length
        self.bias = bias
        self.pinned = pinned
        self.found: list[torch.Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls ``function``, with other scores if it is one that ends in them."""
        kwargs = dict(kwargs or {})
        if function is torch.where and self.pinned and self._is_square(args[0]):
            args = (self._in_sight(args[0]), *args[1:])
        elif function in SOFTMAX and self._is_square(args[0]):
            args = (self._changed(args[0]), *args[1:])
        elif function is functional.scaled_dot_product_attention and self._is_square(kwargs.get("attn_mask")):
            kwargs["attn_mask"] = self._changed(kwargs["attn_mask"])
        return function(*args, **kwargs)

    def _is_square(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2:] == (self.length, self.length)

    @staticmethod
    def _in_sight(condition: torch.Tensor) -> torch.Tensor:
        condition = condition.clone()
        condition[..., TOKENS:, :TOKENS] = True
        return condition

    def _changed(self, scores: torch.Tensor) -> torch.Tensor:
        self.found.append(scores)
        if self.bias is None or scores.dtype == torch.bool:
            return scores
        scores = scores.expand(self.bias.shape).clone()
        scores[..., TOKENS:, :TOKENS] -= self.bias[..., TOKENS:, :TOKENS]
        return scores


def bias_of(model: PreTrainedModel, arguments: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What ``model`` adds to its scores, and nothing for a query's own key: the scores of a model without weights.

    ``None`` where it adds nothing but a mask, the same for all in sight.
    """
    empty: Any = copy.deepcopy(model)
    with torch.no_grad():
        for weight in empty.parameters():
            weight.zero_()
        with ChangedScores(arguments["input_ids"].shape[1]) as scores:
            # Some versions of transformers move position ids in place.
            empty(**{name: value.clone() for name, value in arguments.items()})
    if not scores.found or scores.found[0].dtype == torch.bool:
        return None
    bias = scores.found[0] - scores.found[0].diagonal(dim1=-2, dim2=-1)[..., None]
    in_sight = torch.ones_like(bias, dtype=torch.bool).tril()
    return bias if bias[in_sight].abs().max() > 1e-6 else None
