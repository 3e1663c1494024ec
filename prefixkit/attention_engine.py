"""The attention engine: K and V join inside the attention call.

A function of our own stands in front of the model's attention implementation. It receives query,
key and value after rotation and after the cache update, puts the prefix's K and V in front,
widens the mask, and calls the implementation it wraps. Cache, 2-D mask and ``generate`` see
nothing of the prefix.

What belongs to one call (:class:`PrefixState`) travels with it, as a keyword argument that the
stack hands down to its attention. So it survives gradient checkpointing, threads, and two forwards
before one backward; it is never looked up in a place that the next forward writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.adapter import RelativeBias, Site, Stack
from prefixkit.call import StackCall
from prefixkit.errors import EngineError
from prefixkit.layout import KeyValue
from prefixkit.positions import place_positions
from prefixkit.widening import put_in_front, widen_bias, widen_block_mask, widen_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from prefixkit.attachment import Attachment

STATE = "prefix_state"
"""The keyword argument under which the state travels."""
SITE = "_prefixkit_site"
"""The attribute that marks an attention module as a site."""


@dataclass
class PrefixState:
    """The prefix during one call of one stack.

    Attributes:
        pieces: K and V of the stack's sites, by module path.
        num_virtual_tokens: Length P of the prefix.
        query_positions: Positions of the queries with the prefix counted, ``(batch or 1, queries)``.
        slide: Whether the prefix slides out of a site's window like ordinary context.
        dropout: Share of the prefix's numbers dropped in training.
        bias: Relative-position bias of the prefix's columns, ``(batch or 1, heads, queries, P)``;
            ``None`` stands for zeros.
    """

    pieces: dict[str, KeyValue]
    num_virtual_tokens: int
    query_positions: torch.Tensor | None
    slide: bool
    dropout: float
    bias: torch.Tensor | None = None
    _causal: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _block_masks: list[tuple[Any, int | None, Any]] = field(default_factory=list)

    def causal_mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """``(1, 1, queries, keys)``, true where key ``k`` is at most ``q``; made once per call."""
        if (queries, keys) not in self._causal:
            full = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
            self._causal[queries, keys] = full.tril()
        return self._causal[queries, keys].to(device)

    def widened(self, mask: Any, seen: torch.Tensor | None, window: int | None, batch: int) -> Any:
        """``mask`` with the prefix's columns in front; a block mask is widened once per call and window."""
        if isinstance(mask, torch.Tensor):
            return widen_mask(mask, seen, self.num_virtual_tokens)
        for real, of_window, wider in self._block_masks:
            if real is mask and of_window == window:
                return wider
        wider = widen_block_mask(mask, seen, self.num_virtual_tokens, batch)
        self._block_masks.append((mask, window, wider))
        return wider


OFF = PrefixState(pieces={}, num_virtual_tokens=0, query_positions=None, slide=False, dropout=0.0)
"""Travels while the prefix is disabled, so that a lost state is never taken for a disabled one."""


class AttentionEngine:
    """Puts the prefix in front of keys and values inside every attention call.

    Right under gradient checkpointing, left padding, packing, static caches and sliding windows,
    since nothing outside the attention call changes but the positions.
    """

    name = "attention"

    def check(self, model: nn.Module, attachment: Attachment) -> None:
        """Raise if the attention implementation cannot be wrapped, or a stack cannot carry the state."""
        for stack in attachment.stacks:
            if not internals.takes_any_keyword(model.get_submodule(stack.path)):
                raise EngineError(
                    f"the stack {stack.path!r} takes no further keyword arguments, so the attention engine cannot "
                    "reach its attention; pass engine='cache'"
                )
        for config in self._configs(model, attachment):
            internals.check_wrappable(config)

    def attach(self, model: nn.Module, attachment: Attachment) -> None:
        """Wrap the attention implementation of the stacks and mark the sites."""
        for config in self._configs(model, attachment):
            internals.wrap_implementation(config, make_attention)
        for site in attachment.layout.sites:
            model.get_submodule(site.path).__dict__[SITE] = site

    def detach(self, model: nn.Module, attachment: Attachment) -> None:
        """Undo :meth:`attach`."""
        for site in attachment.layout.sites:
            model.get_submodule(site.path).__dict__.pop(SITE, None)
        for config in self._configs(model, attachment):
            internals.unwrap_implementation(config)

    @staticmethod
    def _configs(model: nn.Module, attachment: Attachment) -> list[PreTrainedConfig]:
        paths = [stack.path for stack in attachment.stacks] + [site.path for site in attachment.layout.sites]
        configs: dict[int, PreTrainedConfig] = {}
        for path in paths:
            config = internals.config_of(model.get_submodule(path))
            configs[id(config)] = config
        return list(configs.values())

    def before(
        self, module: nn.Module, stack: Stack, arguments: dict[str, Any], attachment: Attachment, flat: torch.Tensor
    ) -> dict[str, Any]:
        """The stack's arguments with positions moved and the state added."""
        if internals.is_checkpointing(module) and internals.uses_reentrant_checkpointing(module):
            raise EngineError(
                "reentrant gradient checkpointing does not train every prefix (the graph of an MLP is gone when the "
                "second layer is recomputed); enable checkpointing with its keyword arguments set to "
                "{'use_reentrant': False}"
            )
        # Again at every call: set_attn_implementation() may have been called since.
        internals.wrap_implementation(internals.config_of(module), make_attention)
        cache = arguments.get("past_key_values") if stack.name == "decoder" else None
        if internals.held_prefix(cache) is not None:
            raise EngineError(
                "the cache passed in already holds a prefix, from to_cache() or the cache engine; it is "
                "for the bare model: call it under prefixkit.disabled(model), or after prefixkit.remove(model)"
            )
        call = StackCall.read(arguments, cache.get_seq_length() if cache is not None else 0)
        real = place_positions(module, stack, arguments, call, attachment.offset(stack))
        return {**arguments, STATE: self._state(module, stack, attachment, flat, real)}

    def off(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The stack's arguments while the prefix is disabled."""
        return {**arguments, STATE: OFF}

    def after(self, module: nn.Module, arguments: dict[str, Any], output: Any) -> Any:
        """The stack's output, unchanged."""
        return output

    @staticmethod
    def _state(
        module: nn.Module, stack: Stack, attachment: Attachment, flat: torch.Tensor, real: torch.Tensor
    ) -> PrefixState:
        config = attachment.config
        moved = real + config.num_virtual_tokens
        here = {site.path for site in stack.sites}
        pieces = zip(attachment.layout.sites, attachment.layout.split(flat), strict=True)
        state = PrefixState(
            pieces={site.path: piece for site, piece in pieces if site.path in here},
            num_virtual_tokens=config.num_virtual_tokens,
            query_positions=moved,
            slide=config.window == "slide",
            dropout=config.prefix_dropout,
        )
        if isinstance(stack.positions, RelativeBias) and attachment.offset(stack):
            with internals.whole_weights():
                state.bias = stack.positions.prefix_bias(module, moved, config.num_virtual_tokens)
        return state


def make_attention(name: str) -> internals.AttentionFunction:
    """The attention function that stands in front of implementation ``name``."""

    def prefix_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        original = internals.original_attention(name, module)
        state: PrefixState | None = kwargs.pop(STATE, None)
        site: Site | None = module.__dict__.get(SITE)
        if site is None or state is OFF:
            return original(module, query, key, value, attention_mask, **kwargs)
        if state is None:
            raise EngineError(
                f"the prefix did not reach {site.path!r}: its stack was not called as a module, or does "
                "not hand keyword arguments down to its attention"
            )
        _check_heads(site, key, value)
        seen = _seen_prefix(site, state)
        if attention_mask is None and _sdpa_would_be_causal(name, module, query.shape[2], kwargs):
            attention_mask = state.causal_mask(query.shape[2], key.shape[2], query.device)
        if attention_mask is None and seen is not None:
            attention_mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
        if attention_mask is not None:
            attention_mask = state.widened(attention_mask, seen, site.window, len(query))
        if kwargs.get("position_bias") is not None:
            front = None if site.stack == "cross" else state.bias
            kwargs["position_bias"] = widen_bias(kwargs["position_bias"], front, state.num_virtual_tokens, len(query))
        dropout = state.dropout if module.training else 0.0
        piece = state.pieces[site.path]
        key, value = put_in_front(piece.key, key, dropout), put_in_front(piece.value, value, dropout)
        return original(module, query, key, value, attention_mask, **kwargs)

    return prefix_attention


def _check_heads(site: Site, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse keys and values that are not what the adapter said; broadcasting would hide some."""
    given = (key.shape[1], key.shape[3], value.shape[3])
    if given != (site.kv_heads, site.key_dim, site.value_dim):
        raise EngineError(
            f"{site.path!r} has {given[0]} heads of keys ({given[1]}) and values ({given[2]}) here, and the prefix "
            f"{site.kv_heads} of ({site.key_dim}) and ({site.value_dim}); the adapter is wrong, or the model's heads "
            "are spread over devices (tensor parallel), which is not supported"
        )


def _sdpa_would_be_causal(name: str, module: nn.Module, queries: int, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa, given no mask, would make a causal one of its own.

    It aligns that mask at the upper left, so with a prefix in front a token would not even see
    itself. Eager attention without a mask sees everything, as does a single query.
    """
    asked = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if asked is None else asked
    return name == "sdpa" and queries > 1 and bool(causal)


def _seen_prefix(site: Site, state: PrefixState) -> torch.Tensor | None:
    """Which queries see which virtual tokens, ``(batch or 1, 1, queries, P)``; ``None``: all do."""
    if not state.slide or site.window is None or state.query_positions is None:
        return None
    columns = torch.arange(state.num_virtual_tokens, device=state.query_positions.device)
    return (state.query_positions[:, None, :, None] - columns) < site.window
