"""What stands in for ``model.generate`` knows how to call the one that was there."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OwnGenerate:
    """Base of what stands in for ``model.generate`` on an instance."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.own: Callable[..., Any] | None = model.__dict__.get("generate")

    @property
    def __signature__(self) -> Signature:
        return signature(self.original())

    def original(self) -> Callable[..., Any]:
        """The instance's own function, or the bound method of its class."""
        method: Callable[..., Any] = type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        return self.own or method
