"""The prefix during one call of one stack, and how it gets to the stack's attention.

It travels with the call, as a keyword argument that the stack hands down. So it survives gradient
checkpointing, threads, and two forwards before one backward; it is never looked up in a place that
the next forward writes.

A stack that hands nothing down has it beside the call, in a context variable that is set while the
stack runs. A context variable belongs to one thread. Layers that are computed again in the backward
pass get the state that they were first computed with, since their checkpoint function keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from prefixkit.adapter import Site
from prefixkit.errors import EngineError
from prefixkit.kept import Kept, once
from prefixkit.layout import KeyValue
from prefixkit.tensor_parallel import heads_here
from prefixkit.widening import (
    additive,
    as_in_call,
    hide_columns,
    put_in_front,
    widen_bias,
    widen_block_mask,
    widen_mask,
)

if TYPE_CHECKING:
    from prefixkit.additions import Addition

Function = TypeVar("Function", bound=Callable[..., Any])

STATE = "prefix_state"
"""The keyword argument under which the state travels."""
NO_MASK = (
    "a prefix that only some queries see (window='slide', infix=True, prefixkit.rows) is not served where attention is "
    "called without a mask, as here; pass attention_mask, or make the model with attn_implementation='eager'"
)
MARK = "_prefixkit_site"
"""The attribute that marks an attention module as a site."""


class Witness:
    """Notes that a state has reached attention. FSDP2 hands copies of dataclasses down, but not of this."""

    def __init__(self) -> None:
        self.reached = False
        self.asked: set[str] = set()
        """Places of the sites that have asked; not those in compiled layers."""


@dataclass
class PrefixState:
    """The prefix during one call of one stack.

    Attributes:
        pieces: K and V of the sites, by the site's place.
        num_virtual_tokens: Length P of the prefix.
        query_positions: Positions of the queries with the prefix counted, ``(batch or 1, queries)``;
            ``None`` where nothing asks for them.
        slide: Whether the prefix slides out of a site's window like ordinary context.
        dropout: Share of the prefix's numbers dropped in training.
        bias: Relative-position bias of the prefix's columns, ``(batch or 1, heads, queries, P)``;
            ``None`` stands for zeros.
        witness: Notes whether any attention has asked for it; ``None`` in a compiled graph.
        turns: How often each module that several layers share has called its attention so far, by path.
        shifts: Whether real tokens were moved behind the prefix.
        addition: What the sites add to their attention's output instead of keys and values in front of it.
        behind: Which queries stand behind the prefix and see it, ``(batch or 1, queries)``; ``None``: all.
        read: Where there is no prefix yet: takes the keys and values that the base makes of a text, by the
            site's place; of several runs of a stack those of the first.
        places: Of the sites that have a prefix in this call; others on the model are left alone.
        lengths: Where rows have prefixes of their own: how many of the virtual tokens, the last ones, each row
            sees, by the site's place. K and V are then ``(batch, kv_heads, P, dim)``.
        kept: What the steps of one generation share; see :mod:`prefixkit.kept`.
    """

    pieces: dict[str, KeyValue]
    num_virtual_tokens: int
    query_positions: torch.Tensor | None
    slide: bool
    dropout: float
    bias: torch.Tensor | None = None
    witness: Witness | None = None
    turns: dict[str, int] = field(default_factory=dict)
    shifts: bool = False
    addition: Addition | None = None
    behind: torch.Tensor | None = None
    read: dict[str, KeyValue] | None = None
    places: frozenset[str] = frozenset()
    lengths: Mapping[str, tuple[int, ...]] | None = None
    kept: Kept | None = None
    _causal: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict)
    _masks: list[tuple[Any, tuple[Any, ...], Any]] = field(default_factory=list)

    def causal_mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """``(1, 1, queries, keys)``, true where key ``k`` is at most ``q``; made once per call."""
        size = queries, keys, device
        if size not in self._causal:
            self._causal[size] = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril()
        return self._causal[size]

    def tokens(self, site: Site) -> int:
        """How many virtual tokens ``site`` has: the last ones of the prefix."""
        return self.pieces[site.place].key.shape[-2]

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that the sites have of the prefix, each with the site's place."""
        for place, pair in self.pieces.items():
            yield from ((place, part) for part in pair)
        if self.addition is not None:
            yield from self.addition.parts()

    def serves(self, site: Site) -> bool:
        """Whether ``site`` has a prefix in this call."""
        return self.read is not None or site.place in self.places

    def widened(self, mask: Any, site: Site, batch: int) -> Any:
        """``mask`` with the prefix's columns in front, made once for sites that are alike."""
        tokens = self.tokens(site)

        def widen() -> Any:
            if isinstance(mask, torch.Tensor):
                return widen_mask(mask, self.seen(site), tokens)
            return widen_block_mask(mask, self.seen(site), tokens, batch)

        kind = (site.window, tokens, None if self.lengths is None else self.lengths[site.place])
        return self._once(mask, kind, widen)

    def additive(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``mask`` as numbers to add to scores, made once for all sites; nothing is -inf."""
        made: torch.Tensor = self._once(mask, (dtype,), lambda: additive(mask, dtype))
        return made

    def _once(self, mask: Any, kind: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        for real, of_kind, made in self._masks:
            if real is mask and of_kind == kind:
                return made
        self._masks.append((mask, kind, make()))
        return self._masks[-1][2]

    def bias_of(self, site: Site) -> torch.Tensor | None:
        """The bias of the columns of ``site``; ``None`` stands for zeros."""
        if self.bias is None or site.stack == "cross":
            return None
        return self.bias[..., self.num_virtual_tokens - self.tokens(site) :]

    def note(self, module: nn.Module, site: Site, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what the base made of a text, ``(batch, kv_heads, keys, dim)``, with the heads of all processes."""
        heads = heads_here(module, site, key, value)
        if self.read is not None and site.place not in self.read:
            self.read[site.place] = KeyValue(*heads.gathered(key[0], value[0]))

    def is_seen_by_all(self, site: Site) -> bool:
        """Whether every query of every row sees all virtual tokens."""
        slides = self.slide and site.window is not None and self.query_positions is not None
        return self.behind is None and self.lengths is None and not slides

    def seen(self, site: Site) -> torch.Tensor | None:
        """Which queries see which virtual tokens, ``(batch or 1, 1, queries or 1, P)``; ``None``: all do."""
        if self.behind is not None:
            return self.behind[:, None, :, None].expand(-1, -1, -1, self.tokens(site))
        own, near = self._own(site), self._near(site)
        return near if own is None else own if near is None else own.to(near.device) & near

    def _own(self, site: Site) -> torch.Tensor | None:
        """Which virtual tokens are each row's own, ``(batch, 1, 1, P)``; ``None``: all are every row's."""
        if self.lengths is None:
            return None
        lengths = torch.tensor(self.lengths[site.place])
        return torch.arange(self.tokens(site)) >= self.tokens(site) - lengths[:, None, None, None]

    def _near(self, site: Site) -> torch.Tensor | None:
        """Which virtual tokens stand in the site's window, ``(batch or 1, 1, queries, P)``; ``None``: all do."""
        if not self.slide or site.window is None or self.query_positions is None:
            return None
        first = self.num_virtual_tokens - self.tokens(site)
        columns = torch.arange(first, self.num_virtual_tokens, device=self.query_positions.device)
        return (self.query_positions[:, None, :, None] - columns) < site.window


OFF = PrefixState(pieces={}, num_virtual_tokens=0, query_positions=None, slide=False, dropout=0.0)
"""Travels while the prefix is disabled, so that a lost state is never taken for a disabled one."""

_beside: ContextVar[Mapping[str, PrefixState]] = ContextVar("prefixkit_states", default={})  # noqa: B039 - never written to
"""The states of the stacks that are running in this thread, by their key."""


def _never_compiled(function: Function) -> Function:
    """torch.compile does not know context variables, and would take their value for a constant."""
    outside: Function = torch.compiler.disable(function)
    return outside


@dataclass(frozen=True)
class SiteMark:
    """Stands on an attention module while a prefix is attached.

    Attributes:
        sites: The sites that the module is: one, unless several layers share it.
        stack: Key of its stack's state beside the call.
        turns: How often the module calls its attention in one run of its stack, with a prefix or without.
        stands_in: Whether a ``site_forward`` puts the prefix in front, so that nothing else may.
    """

    sites: tuple[Site, ...]
    stack: str
    turns: int = 1
    stands_in: bool = False

    def site(self, state: PrefixState, *, looks: bool = False) -> Site | None:
        """The site of the call under way: where layers share the module, the next one in turn, if it has a prefix.

        It stays the next one for a call that only ``looks``.
        """
        path = self.sites[0].path
        if self.turns == 1:
            return self.sites[0]
        turn = state.turns.get(path, 0)
        state.turns[path] = turn if looks else turn + 1
        return next((site for site in self.sites if site.turn == turn % self.turns), None)


def state_in(arguments: dict[str, Any], stack: str) -> PrefixState | None:
    """The state of a stack's call, that travels with ``arguments`` or beside them."""
    state: PrefixState | None = arguments.get(STATE)
    return look_beside(stack) if state is None else state


@_never_compiled
def put_beside(stack: str, state: PrefixState) -> None:
    """Have the state beside the call until :func:`take_away`."""
    _beside.set({**_beside.get(), stack: state})


@_never_compiled
def take_away(stack: str) -> None:
    """The stack has run, or failed."""
    _beside.set({name: state for name, state in _beside.get().items() if name != stack})


@_never_compiled
def look_beside(stack: str) -> PrefixState | None:
    """The state of a stack that is running, if it travels beside the call."""
    return _beside.get().get(stack)


@contextmanager
def _beside_again(states: Mapping[str, PrefixState]) -> Iterator[None]:
    token = _beside.set(states)
    try:
        yield
    finally:
        _beside.reset(token)


def _counting_from_here(state: PrefixState) -> PrefixState:
    """The same state, with turns of its own."""
    return state if state is OFF else replace(state, turns=dict(state.turns))


class KeepingCheckpoint:
    """A checkpoint function that computes layers again with the states of the first time.

    Args:
        function: The checkpoint function that it stands in for.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the function it stands in for."""
        states = _beside.get()
        counted = {name: _counting_from_here(state) for name, state in states.items()}
        runs = iter((states,))  # the first time; later ones start to count where it did

        def with_states(*inputs: Any, **options: Any) -> Any:
            again = {name: _counting_from_here(state) for name, state in counted.items()}
            with _beside_again(next(runs, again)):
                return layer(*inputs, **options)

        return self.function(with_states, *args, **kwargs)


def find_state(module: nn.Module, arguments: dict[str, Any], *, looks: bool = False) -> tuple[Site, PrefixState] | None:
    """The site that ``module`` is and the state of the call under way, taken out of ``arguments``.

    Args:
        module: An attention module.
        arguments: What it was called with by name.
        looks: Whether the keys and values of this call come later, so that it is the module's turn still.

    Returns:
        ``None`` if it is no site, or while the prefix is disabled.

    Raises:
        EngineError: If it is a site and no state has reached it.
    """
    state: PrefixState | None = arguments.pop(STATE, None)
    mark: SiteMark | None = module.__dict__.get(MARK)
    if mark is None or state is OFF:
        return None
    if state is None:
        state = look_beside(mark.stack)
    if state is OFF:
        return None
    if state is None:
        raise EngineError(
            f"the prefix did not reach {mark.sites[0].path!r}: its stack was not called as a module, or does "
            "not hand keyword arguments down to its attention (an adapter says so with hands_down=False)"
        )
    if state.witness is not None and not looks:
        state.witness.reached = True
    site = mark.site(state, looks=looks)
    if site is None or not state.serves(site):
        return None
    if state.witness is not None and not looks and not torch.compiler.is_compiling():
        state.witness.asked.add(site.place)
    return site, state


def stands_in(module: nn.Module) -> bool:
    """Whether a ``site_forward`` of the module's own puts its prefix in front."""
    mark: SiteMark | None = module.__dict__.get(MARK)
    return mark is not None and mark.stands_in


def is_served(module: nn.Module) -> bool:
    """Whether the prefix of ``module`` is not disabled in the call under way, as it stands beside that call."""
    mark: SiteMark | None = module.__dict__.get(MARK)
    return mark is not None and look_beside(mark.stack) is not OFF


def in_front(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and mask of one attention call with the prefix in front, for a ``site_forward``.

    Example::

        key, value, mask = prefixkit.in_front(module, key, value, mask)
        scores = query @ key.transpose(-1, -2) * scaling + mask

    Without a prefix on ``module``, or while it is disabled, all three come back as they are. The mask may
    hold a bias of positions too: the prefix's columns get zeros, or what the adapter's ``prefix_bias`` says.

    Args:
        module: The site's module.
        key: ``(batch, kv_heads, keys, key_dim)``.
        value: ``(batch, kv_heads, keys, value_dim)``.
        mask: ``(batch or 1, heads or 1, queries, keys)``, boolean (true: seen) or additive, or ``None``:
            every query sees every key.

    Returns:
        Key, value and mask with P more keys. Where some queries do not see some of the prefix, there is a mask,
        additive, even if there was none.

    Raises:
        EngineError: If the prefix has not reached the module, or has other heads than ``key``.
    """
    found = find_state(module, {})
    if found is None:
        return key, value, mask
    site, state = found
    if state.read is not None:
        state.note(module, site, key, value)
        return key, value, mask
    seen = state.seen(site)
    if seen is not None and mask is None:
        mask = key.new_zeros(1, 1, seen.shape[2], key.shape[2])
    bias = state.bias_of(site)
    if mask is not None and bias is not None:
        mask = widen_bias(mask, bias, state.tokens(site), key.shape[0])
        if seen is not None:
            mask = hide_columns(mask, seen)
    elif mask is not None:
        mask = state.widened(mask, site, key.shape[0])
    key, value = put_before(piece_of(module, site, state, key, value), key, value)
    return key, value, mask


def keys_in_front(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`in_front`, where the mask is seen to elsewhere."""
    found = find_state(module, {})
    if found is None:
        return key, value
    site, state = found
    if state.read is not None:
        state.note(module, site, key, value)
        return key, value
    return put_before(piece_of(module, site, state, key, value), key, value)


def put_before(piece: KeyValue, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``key`` and ``value`` with what :func:`piece_of` gives in front."""
    return put_in_front(piece.key, key), put_in_front(piece.value, value)


def piece_of(  # noqa: PLR0917 - as the attention function is given them
    module: nn.Module,
    site: Site,
    state: PrefixState,
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor | None = None,
) -> KeyValue:
    """The site's K and V as they stand in front of ``key`` and ``value``: of their dtype, with the prefix's dropout."""
    heads = heads_here(module, site, key, value, query)
    dropout = state.dropout if module.training else 0.0
    piece = state.pieces[site.place]

    def as_here() -> KeyValue:
        front = heads.of(*piece)
        return KeyValue(as_in_call(front[0], key, dropout), as_in_call(front[1], value, dropout))

    return as_here() if dropout else once(state.kept, (site.place, piece.key.shape, key.dtype, key.device), as_here)
