"""A gate in front of what a prefix gives: training starts at the base model, bit for bit.

As in Zhang et al. 2023 (arXiv 2303.16199, §3.2) the prefix has a softmax of its own, and what
comes of it is added to the attention's output times ``tanh`` of a number that starts at zero. Here there is one
such number for each head of keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from prefixkit.errors import ConfigError, EngineError, MethodError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prefixkit.adapter import Site, Stack
    from prefixkit.layout import Layout
    from prefixkit.prefix_config import PrefixConfig
    from prefixkit.prefix_state import PrefixState

GATE = "gate"
"""The parameter's name in the prefix encoder, ``(all kv_heads of all sites,)``."""


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


def check_gate(config: PrefixConfig, stacks: Iterable[Stack], engine: str) -> None:
    """Raise where a shut gate would not be the base.

    Raises:
        ConfigError: For a policy that changes more than the attention.
        EngineError: If the attention's output cannot be reached.
    """
    if config.positions != "none":
        raise ConfigError(
            "gate=True starts at the base model, and positions='shift' would move its tokens; pass positions='none'"
        )
    if config.window != "pinned":
        raise ConfigError("gate=True has a softmax over the whole prefix; use window='pinned'")
    if engine != "attention":
        raise EngineError("a native cache holds no gate; gate=True needs engine='attention'")
    for stack in stacks:
        if stack.site_forward is not None:
            raise EngineError(
                f"the attention of {stack.path!r} is not on transformers' attention interface, so nothing can be added "
                "to its output; gate=True is not served here"
            )


def open_gates(gate: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """``tanh`` of the gate ``(kv_heads,)`` by the site's place."""
    parts = gate.tanh().split([site.kv_heads for site in layout.sites])
    return {site.place: part for site, part in zip(layout.sites, parts, strict=True)}


def add_gated(
    output: torch.Tensor,
    query: torch.Tensor,
    options: Mapping[str, Any],
    *,
    site: Site,
    state: PrefixState,
    training: bool,
) -> torch.Tensor:
    """The attention's output and, through the gate, what the query finds in the prefix.

    Args:
        output: ``(batch, queries, heads, value_dim)``.
        query: ``(batch, heads, queries, key_dim)``.
        options: What the attention function was called with by name.
        site: Where this is.
        state: The prefix of this call, with gates.
        training: Whether the prefix's numbers are dropped.
    """
    piece, groups = state.pieces[site.place], query.shape[1] // site.kv_heads
    dropped = (functional.dropout(part, state.dropout, training) for part in piece)
    key, value, gate = (part.to(query).repeat_interleave(groups, dim=0) for part in (*dropped, state.gates[site.place]))
    scaling = options.get("scaling")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = (scores / options["softcap"]).tanh() * options["softcap"]
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    found: torch.Tensor = weights @ value * gate[:, None, None]
    return output + found.transpose(1, 2)
