"""What is added to an attention's output, in place of keys and values in front.

Both start at the base model, bit for bit: a gate that is shut, a memory that is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from prefixkit.errors import ConfigError, EngineError, MethodError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from prefixkit.adapter import Site, Stack
    from prefixkit.layout import KeyValue, Layout
    from prefixkit.prefix_config import PrefixConfig
    from prefixkit.tensor_parallel import Heads

GATE = "gate"
"""The gate's name in the prefix encoder: a parameter ``(all kv_heads of all sites,)``."""


class Addition(Protocol):
    """What a site adds to its attention's output."""

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that the sites have of it, each with the site's place."""

    def of(
        self, query: torch.Tensor, options: Mapping[str, Any], site: Site, heads: Heads, training: bool
    ) -> torch.Tensor:
        """What ``site`` adds, ``(batch, heads, queries, value_dim)``.

        Args:
            query: ``(batch, heads, queries, key_dim)``.
            options: What the attention function was called with by name.
            site: Where this is.
            heads: Which of its heads are here.
            training: Whether the prefix's numbers are dropped.
        """


@dataclass(frozen=True)
class GatedPrefix:
    """A prefix with a softmax of its own, times ``tanh`` of a number that starts at zero.

    As in Zhang et al. 2023 (arXiv 2303.16199, §3.2); here one number for each head of keys and values.

    Attributes:
        pieces: K and V by the site's place.
        gates: ``tanh`` of the gates, ``(kv_heads,)`` by the site's place.
        dropout: Share of the prefix's numbers dropped in training.
    """

    pieces: Mapping[str, KeyValue]
    gates: Mapping[str, torch.Tensor]
    dropout: float

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Keys, values and gates."""
        for place, pair in self.pieces.items():
            yield from ((place, part) for part in (*pair, self.gates[place]))

    def of(
        self, query: torch.Tensor, options: Mapping[str, Any], site: Site, heads: Heads, training: bool
    ) -> torch.Tensor:
        """What the query finds in the prefix, through the gate."""
        gate = self.gates[site.place][:, None, None]
        *own, gate = heads.of(*self.pieces[site.place], gate)
        dropped = (functional.dropout(part, self.dropout, training) for part in own)
        key, value, gate = (_for_each(query, part) for part in (*dropped, gate))
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # A product in half precision may overflow before it is scaled.
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(exact) @ key.to(exact).mT * scaling
        if options.get("softcap") is not None:
            scores = (scores / options["softcap"]).tanh() * options["softcap"]
        weights = scores.softmax(-1).to(query.dtype)
        found: torch.Tensor = weights @ value * gate
        return found


@dataclass(frozen=True)
class PrefixMemory:
    """A matrix that the query is looked up in: φ(q)ᵀM, with φ = elu + 1 as in linear attention.

    Wang et al. 2025 (arXiv 2506.13674) take the prefix out of the softmax so: it competes with no token.

    Attributes:
        matrices: M, ``(kv_heads, key_dim, value_dim)`` by the site's place.
        dropout: Share of its numbers dropped in training.
    """

    matrices: Mapping[str, torch.Tensor]
    dropout: float

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The matrices."""
        yield from self.matrices.items()

    def of(
        self, query: torch.Tensor, options: Mapping[str, Any], site: Site, heads: Heads, training: bool
    ) -> torch.Tensor:
        """What the query finds in the memory."""
        (own,) = heads.of(self.matrices[site.place])
        matrix = functional.dropout(own, self.dropout, training)
        found: torch.Tensor = (functional.elu(query) + 1) @ _for_each(query, matrix)
        return found


def _for_each(query: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part (kv_heads, …)`` once for each head of the query, on its device and in its dtype."""
    return part.to(query).repeat_interleave(query.shape[1] // len(part), dim=0)


def memory_width(layout: Layout) -> int:
    """Numbers of the memories of all sites."""
    return sum(site.kv_heads * site.key_dim * site.value_dim for site in layout.sites)


def split_memory(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The memories ``(kv_heads, key_dim, value_dim)`` by place, of all their numbers ``(1, memory_width)``."""
    shapes = [(site.kv_heads, site.key_dim, site.value_dim) for site in layout.sites]
    parts = flat[0].split([heads * key * value for heads, key, value in shapes])
    return {site.place: part.view(shape) for site, shape, part in zip(layout.sites, shapes, parts, strict=True)}


def split_gate(gate: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """``tanh`` of the gate, ``(kv_heads,)`` by the site's place."""
    parts = gate.tanh().split([site.kv_heads for site in layout.sites])
    return {site.place: part for site, part in zip(layout.sites, parts, strict=True)}


def add_gate(encoder: nn.Module, layout: Layout) -> None:
    """Give the prefix encoder a gate that is shut.

    Raises:
        MethodError: If it has something else by that name.
    """
    if hasattr(encoder, GATE):
        raise MethodError(f"the prefix encoder {type(encoder).__name__} has a {GATE!r} of its own; use gate=False")
    heads = sum(site.kv_heads for site in layout.sites)
    device = next(encoder.parameters()).device
    encoder.register_parameter(GATE, nn.Parameter(torch.zeros(heads, dtype=torch.float32, device=device)))


def check_addition(what: str, config: PrefixConfig, stacks: Iterable[Stack]) -> None:
    """Raise where what is added would not start at the base. The cache engine refuses it by itself.

    Args:
        what: What it is, for messages.
        config: What the prefix is.
        stacks: Where it goes.

    Raises:
        ConfigError: For a policy that changes more than the attention's output.
        EngineError: If that cannot be reached.
    """
    if config.positions != "none":
        raise ConfigError(
            f"{what} starts at the base model, and positions='shift' would move its tokens; pass positions='none'"
        )
    if config.window != "pinned":
        raise ConfigError(f"{what} is seen as a whole; use window='pinned'")
    for stack in stacks:
        if stack.site_forward is not None:
            raise EngineError(
                f"the attention of {stack.path!r} is not on transformers' attention interface, so nothing can be added "
                f"to its output; {what} is not served here"
            )
