"""What an architecture says about itself: where a prefix goes and how positions move.

Everything here is plain data. A plugin builds it, the engines act on it; none of these
classes is meant to be subclassed.

Example:
    >>> from prefixkit import Site
    >>> site = Site(path="h.0.attn", stack="decoder", layer=0, kv_heads=4, key_dim=16, value_dim=16)
    >>> site.width
    128
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from prefixkit.errors import PluginError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

STACKS: Final = ("encoder", "decoder", "cross")
"""The kinds of attention a prefix can stand in, in the order of the flat prefix."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention call in which a prefix takes part.

    Attributes:
        path: The attention module, as in ``model.get_submodule(path)``.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` (the decoder's attention to the
            encoder's states).
        layer: Which layer of its stack, from 0; the index under which a native cache keeps it.
        kv_heads: Heads of keys and values (fewer than the query heads under GQA and MQA).
        key_dim: Size of one key head.
        value_dim: Size of one value head.
        window: How many positions back a query sees, or ``None`` for all of them.
        turn: Which call of the module within one call of its stack, from 0, where layers share a module.
    """

    path: str
    stack: str
    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    turn: int = 0

    def __post_init__(self) -> None:
        if self.stack not in STACKS:
            raise PluginError(f"site {self.path!r}: stack is {self.stack!r}; possible: {', '.join(STACKS)}")
        for name in ("kv_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise PluginError(f"site {self.path!r}: {name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def place(self) -> str:
        """Names the site among all of a model: its path, and the turn where the module has several."""
        return f"{self.path}#{self.turn}" if self.turn else self.path

    @property
    def width(self) -> int:
        """How many numbers one virtual token takes here, keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class PositionIds:
    """The stack's ``forward`` takes ``position_ids``.

    Attributes:
        limit: How many positions a learned table has for tokens, reserved rows not counted;
            ``None`` where there is no table (rotary).
        offset: The id of position 0: not 0 where ids are rows of a table whose first rows are
            reserved and the caller has to count them. Rows that the model adds by itself do not count.
        prefix_bias: As in :class:`RelativeBias`, where positions enter as a bias on the scores as well.
    """

    limit: int | None = None
    offset: int = 0
    prefix_bias: Callable[[nn.Module, torch.Tensor, int], torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class PositionTable:
    """The stack looks its positions up in a learned table and takes no ``position_ids``.

    Attributes:
        path: The embedding module, relative to the stack.
        offset: Row of position 0.
        limit: How many positions the table has for tokens, rows before ``offset`` not counted.
    """

    path: str
    offset: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """Positions enter as a bias on attention scores.

    Attributes:
        prefix_bias: Given the stack's module, the queries' distances from the prefix's first
            column ``(batch or 1, queries)`` and ``num_virtual_tokens``, returns the bias of the
            prefix's columns ``(batch or 1, heads, queries, num_virtual_tokens)``. The attention engine
            asks for it; ``None`` where only the cache engine serves the stack, or where a ``site_forward``
            adds the bias itself (:func:`prefixkit.alibi_in_front`).
        counts_padding: Whether the model takes padding for distance, so that the cache engine cannot
            serve rows that are padded on the left.
        ignores_ids: Whether the stack's ``forward`` takes ``position_ids`` all the same and does nothing
            with them.
    """

    prefix_bias: Callable[[nn.Module, torch.Tensor, int], torch.Tensor] | None = None
    counts_padding: bool = True
    ignores_ids: bool = False


Positions = PositionIds | PositionTable | RelativeBias


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A run of layers with one mask, one cache and one count of positions.

    Attributes:
        name: ``"encoder"`` or ``"decoder"``.
        path: The module whose ``forward`` receives ``attention_mask`` (and ``past_key_values``),
            relative to the model; ``""`` is the model itself.
        positions: How the stack counts positions; ``None`` if it counts none, or none that could be
            moved. It has ``positions="none"`` then, whatever is asked for.
        sites: Its attention calls. A decoder's cross-attention belongs to it.
        hands_down: Whether the stack hands keyword arguments that it does not know down to its
            attention. Where it does not, the prefix travels beside the call. A ``forward`` without
            ``**kwargs`` hands nothing down, and need not be said to.
        site_forward: For attention that does not go through transformers' attention interface: stands
            in for the ``forward`` of every site's module while there is a prefix, called as
            ``site_forward(module, ...)`` with the arguments of that ``forward`` by name. It computes the
            same, with :func:`prefixkit.in_front` between the projections and the scores;
            :func:`prefixkit.through_cache` is one for attention that takes a cache.
        caches: Whether the stack's native cache keeps exactly what its attention is given, one layer
            for each site, so that the cache engine can serve it.
        turns: Counted by prefixkit from the sites: how often a module calls its attention in one run of the
            stack, by path, where that is more than once. ``layers=`` may leave some of these without a
            prefix; they are counted all the same.
    """

    name: str
    path: str
    positions: Positions | None
    sites: tuple[Site, ...]
    hands_down: bool = True
    site_forward: Callable[..., Any] | None = None
    caches: bool = True
    turns: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in STACKS[:2]:
            raise PluginError(f"stack {self.path!r}: name is {self.name!r}; possible: {', '.join(STACKS[:2])}")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Everything prefixkit has to know about one architecture.

    Attributes:
        model_types: The ``config.model_type`` values it answers for.
        stacks: Given a model, yields its :class:`Stack` objects. Called on every ``apply`` and
            ``load``, with any task class of the architecture.
    """

    model_types: tuple[str, ...]
    stacks: Callable[[PreTrainedModel], Iterable[Stack]]


def find_stack(model: nn.Module, landmark: str) -> str | None:
    """Path of the module under which ``landmark`` stands, or ``None``.

    One landmark serves every task class of an architecture, however deep it nests the stack.

    Example:
        ``find_stack(model, "layers.0.attention")`` is ``"model"`` for a language model whose layers
        are ``model.layers``, and ``""`` for that inner model itself.

    Raises:
        PluginError: If the landmark stands in more than one place.
    """
    tail = "." + landmark
    found = [name[: -len(tail)] for name, _ in model.named_modules() if ("." + name).endswith(tail)]
    found = [name.removeprefix(".") for name in found]
    if len(found) > 1:
        raise PluginError(f"{landmark!r} stands in {len(found)} places of {type(model).__name__}: {found}")
    return found[0] if found else None


def join_path(*parts: str) -> str:
    """Join module paths; empty parts vanish."""
    return ".".join(part for part in parts if part)
