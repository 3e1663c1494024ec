"""A method: a named way to parametrise a prefix, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefixkit.errors import MethodError, closest

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class PrefixShape:
    """What a method needs to know to build a prefix encoder.

    Attributes:
        num_virtual_tokens: Length P of the prefix.
        width: Numbers per virtual token over all sites; ``num_layers × 2 × token_dim`` for a
            uniform decoder.
        hidden_size: The model's hidden size, the natural width of a token embedding.
    """

    num_virtual_tokens: int
    width: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named way to parametrise a prefix.

    Attributes:
        name: What users pass as ``method=``.
        build: Given a :class:`PrefixShape` and the options, returns the prefix encoder: a module
            whose ``forward()`` takes nothing and returns the flat prefix
            ``(num_virtual_tokens, width)`` in float32.
        options: The options the method understands, with their defaults. ``prefix_dropout`` is
            applied by the engines: the share of the prefix's numbers dropped in training.
    """

    name: str
    build: Callable[[PrefixShape, Mapping[str, Any]], nn.Module]
    options: Mapping[str, Any]

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults with the ``given`` options on top.

        Raises:
            MethodError: For an option the method does not have.
        """
        for name in given:
            if name not in self.options:
                raise MethodError(
                    f"method {self.name!r} has no option {name!r}{closest(name, self.options)}; "
                    f"possible: {', '.join(sorted(self.options))}"
                )
        return {**self.options, **given}
