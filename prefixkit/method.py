"""A method: a named way to parametrise a prefix, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prefixkit.errors import MethodError, closest

if TYPE_CHECKING:
    from torch import nn


PREFIX, EMBEDDINGS, MEMORY = "prefix", "embeddings", "memory"
GIVES: Final = (PREFIX, EMBEDDINGS, MEMORY)
"""What a prefix encoder may give."""


@dataclass(frozen=True, kw_only=True)
class PrefixShape:
    """What a method needs to know to build a prefix encoder.

    Attributes:
        num_virtual_tokens: Length P of the prefix.
        width: Numbers per virtual token over all sites; ``num_layers × 2 × token_dim`` for a
            uniform decoder.
        hidden_size: The model's hidden size, the natural width of a token embedding.
        embedding_size: Numbers of one of its token embeddings; 0 where it has none.
        memory_size: Numbers of the memories of all sites: a matrix of keys × values for each head.
        halves: Widths of the keys and of the values of each site, in the order of the flat prefix.
    """

    num_virtual_tokens: int
    width: int
    hidden_size: int
    embedding_size: int = 0
    memory_size: int = 0
    halves: tuple[tuple[int, int], ...] = ()


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
        gives: ``"prefix"``: the encoder gives the flat prefix. ``"embeddings"``: input embeddings
            ``(num_virtual_tokens, embedding_size)``, which the base reads in every call; for decoders only.
            ``"memory"``: ``(1, memory_size)``, a matrix for each head of keys, which queries are looked up in.
        learning_rate: Given the options, the peak learning rate to recommend; ``None``: no idea.
    """

    name: str
    build: Callable[[PrefixShape, Mapping[str, Any]], nn.Module]
    options: Mapping[str, Any]
    gives: str = PREFIX
    learning_rate: Callable[[Mapping[str, Any]], float] | None = None

    def __post_init__(self) -> None:
        if self.gives not in GIVES:
            raise MethodError(f"method {self.name!r} gives {self.gives!r}; possible: {', '.join(GIVES)}")

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
