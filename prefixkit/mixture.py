"""A call whose rows have different prefixes, or none.

Each row has the keys and values of its own prefix. A shorter one stands behind hidden columns, so that the last
virtual tokens of all rows are in the last columns, right before the first real one: distances are then the same
as in a call of that row alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from prefixkit.attachment import Attachment, merged_stacks
from prefixkit.errors import ConfigError, EngineError
from prefixkit.layout import KeyValue, Layout

if TYPE_CHECKING:
    from torch import nn

    from prefixkit.adapter import Stack
    from prefixkit.additions import Addition
    from prefixkit.attention_engine import AttentionEngine
    from prefixkit.cache_engine import CacheEngine
    from prefixkit.prefix_config import PrefixConfig
    from prefixkit.prefixes import Prefixes

Flats = Mapping[str, torch.Tensor]


@dataclass
class Rows:
    """What the rows of a call are to be served with.

    Attributes:
        names: The prefix of each row, or ``None`` for the bare base.
        repeats: How many rows of a call may come from one of these: 1, and in ``generate`` its beams.
    """

    names: tuple[str | None, ...]
    repeats: frozenset[int] = field(default_factory=lambda: frozenset({1}))

    def used(self, prefixes: Prefixes) -> dict[str, Attachment]:
        """The prefixes that some row names, by name."""
        return {name: one for name, one in prefixes.attachments.items() if name in self.names}

    def flats(self, prefixes: Prefixes) -> Flats:
        """The flat prefix of each that some row names."""
        return {name: one.flat() for name, one in self.used(prefixes).items()}

    def mixture(self, prefixes: Prefixes, batch: int) -> Mixture:
        """What a call of ``batch`` rows is served with."""
        used = self.used(prefixes)
        identity = "|".join(used[name].identity if name else "" for name in self.names)
        return Mixture(used, self.of_call(batch), identity)

    def of_call(self, batch: int) -> tuple[str | None, ...]:
        """The prefix of each of ``batch`` rows.

        Raises:
            EngineError: If these are not the rows that were named.
        """
        repeats, left = divmod(batch, len(self.names))
        if left or repeats not in self.repeats:
            raise EngineError(
                f"prefixkit.rows names the prefixes of {len(self.names)} rows, and this call has {batch}; name one for "
                "each row (of multiple choice: for each choice of each row)"
            )
        return tuple([name for name in self.names for _ in range(repeats)])


class Mixture:
    """Several prefixes in one call; to the engines it is like one :class:`Attachment`.

    Args:
        used: The prefixes that some row names, by name, in an order that is the same for all calls.
        rows: The prefix of each row of the call.
        identity: Marks the caches that hold these prefixes.
    """

    def __init__(self, used: Mapping[str, Attachment], rows: tuple[str | None, ...], identity: str) -> None:
        self.used = used
        self.rows = rows
        self.identity = identity
        first = next(iter(used.values()))
        tokens = max(one.config.num_virtual_tokens for one in used.values())
        # Dropout is each prefix's own, and applied where their numbers are put together.
        self.config: PrefixConfig = replace(
            first.config, num_virtual_tokens=tokens, method_options={}, num_frozen_tokens=0
        )
        self.engine: AttentionEngine | CacheEngine = first.engine
        self.host: str = first.host
        self.gives: str = first.gives
        self.adds: bool = False
        self.stacks: tuple[Stack, ...] = merged_stacks(used.values())
        self.layout: Layout = Layout(site for stack in self.stacks for site in stack.sites)

    def at(self, path: str) -> Stack:
        """The stack at ``path``, with the sites of these prefixes."""
        return next(stack for stack in self.stacks if stack.path == path)

    def state_key(self, stack: Stack) -> str:
        """The name of the stack's state beside the call."""
        return next(iter(self.used.values())).state_key(stack)

    def flat(self, module: nn.Module | None = None) -> Flats:
        """The flat prefixes, by name."""
        return {name: one.flat(module) for name, one in self.used.items()}

    def shifts(self, stack: Stack) -> bool:
        """Whether any of the prefixes moves the positions of ``stack``."""
        return any(one.shifts(one.at(stack.path)) for one in self.used.values())

    def offset(self, stack: Stack) -> tuple[int, ...]:
        """How far the positions of ``stack`` move in each row."""
        own = {name: one.offset(one.at(stack.path)) for name, one in self.used.items()}
        return tuple([own[name] if name else 0 for name in self.rows])

    def addition(self, _: Any) -> Addition | None:
        """Nothing: rows are served with keys and values only."""
        return None

    def lengths(self) -> dict[str, tuple[int, ...]]:
        """How many virtual tokens each row has, by the site's place."""
        own = {name: one.tokens_by_place() for name, one in self.used.items()}
        return {
            site.place: tuple([own[name].get(site.place, 0) if name else 0 for name in self.rows])
            for site in self.layout.sites
        }

    def pieces(self, flats: Flats, least: int = 0) -> dict[str, KeyValue]:
        """K and V of all rows, ``(batch, kv_heads, P, dim)`` by the site's place; P is ``least`` or more."""
        own = {name: one.pieces(_dropped(one, flats[name])) for name, one in self.used.items()}
        order = [*own, None]  # the last has nothing to see
        index = torch.tensor([order.index(name) for name in self.rows])
        places = (site.place for site in self.layout.sites)
        return {place: _stacked([of.get(place) for of in own.values()], index, least) for place in places}

    def prepared(self, flats: Flats, *, dtype: torch.dtype, **_: Any) -> dict[str, KeyValue]:
        """:meth:`pieces` in ``dtype``, all of one length, as a native cache has them."""
        pieces = self.pieces(flats, least=self.config.num_virtual_tokens).items()
        return {place: KeyValue(key.to(dtype), value.to(dtype)) for place, (key, value) in pieces}


Served = Attachment | Mixture
"""What a call is served with."""


def _dropped(attachment: Attachment, flat: torch.Tensor) -> torch.Tensor:
    return functional.dropout(flat, attachment.config.prefix_dropout, attachment.encoder.training)


def _stacked(own: Sequence[KeyValue | None], index: torch.Tensor, least: int) -> KeyValue:
    """K and V of one site for the rows that ``index`` says, and behind the last prefix zeros for rows without one."""
    there = [pair for pair in own if pair is not None]
    longest = max(least, *(pair.key.shape[1] for pair in there))
    halves = []
    for half in range(2):
        empty = torch.zeros_like(there[0][half][:, :0])
        parts = [*(empty if pair is None else pair[half] for pair in own), empty]
        padded = torch.stack([functional.pad(part, (0, 0, longest - part.shape[1], 0)) for part in parts])
        halves.append(padded[index.to(padded.device)])
    return KeyValue(*halves)


def check_mixable(used: Mapping[str, Attachment]) -> None:
    """Raise where prefixes cannot be in one call.

    Raises:
        ConfigError: If there is none, they add to the attention's output or are infixes, or have other policies.
    """
    if not used:
        raise ConfigError("prefixkit.rows names no prefix at all; use prefixkit.disabled(model)")
    for name, one in used.items():
        if one.beyond_keys_and_values:
            what = one.beyond_keys_and_values
            raise ConfigError(f"prefix {name!r} has {what}; prefixkit.rows is for keys and values in front")
    windowed = any(site.window is not None for one in used.values() for site in one.layout.sites)
    for field_name in ("positions", "window") if windowed else ("positions",):
        policies = {name: getattr(one.config, field_name) for name, one in used.items()}
        if len(set(policies.values())) > 1:
            raise ConfigError(f"the prefixes of one call need one policy of {field_name}; these have {policies}")
