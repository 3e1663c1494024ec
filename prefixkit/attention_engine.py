"""The attention engine: K and V join inside the attention call.

A function of our own stands in front of the model's attention implementation. It receives query,
key and value after rotation and after the cache update, puts the prefix's K and V in front,
widens the mask, and calls the implementation it wraps. Cache, 2-D mask and ``generate`` see
nothing of the prefix. Where a model's attention is in no registry, its adapter brings a
``site_forward`` that does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import PositionIds, RelativeBias, Site, Stack
from prefixkit.attention_in_parts import attend, can_serve, pays
from prefixkit.call import StackCall
from prefixkit.errors import EngineError
from prefixkit.infix import place_infix
from prefixkit.kept import Kept, once
from prefixkit.positions import place_positions
from prefixkit.prefix_state import (
    MARK,
    OFF,
    STATE,
    KeepingCheckpoint,
    PrefixState,
    SiteMark,
    Witness,
    find_state,
    is_served,
    look_beside,
    piece_of,
    put_before,
    put_beside,
    stands_in,
)
from prefixkit.tensor_parallel import heads_here
from prefixkit.widening import widen_bias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedConfig

    from prefixkit.attachment import Attachment
    from prefixkit.mixture import Served


class UnreachableAttentionError(EngineError):
    """A model's attention cannot be reached from outside; the cache engine may serve it."""


class AttentionEngine:
    """Puts the prefix in front of keys and values inside every attention call.

    Right under gradient checkpointing, left padding, packing, static caches and sliding windows,
    since nothing outside the attention call changes but the positions.
    """

    name = "attention"

    def check(self, model: nn.Module, attachment: Attachment) -> None:
        """Raise if a site's attention, or its implementation, cannot be wrapped."""
        for stack in attachment.stacks:
            if stack.site_forward is not None:
                _check_masks(stack.path, model.get_submodule(stack.path))
            for site in stack.sites:
                _check_reachable(site.path, model.get_submodule(site.path), stack)
            no_bias = isinstance(stack.positions, RelativeBias) and stack.positions.prefix_bias is None
            if no_bias and stack.site_forward is None:
                raise UnreachableAttentionError(
                    f"the adapter says no prefix_bias for {stack.path!r}, which the attention engine needs"
                )
        for config in self._configs(model, attachment):
            internals.check_wrappable(config)

    def attach(self, model: nn.Module, stacks: Sequence[Stack], key_of: Callable[[Stack], str]) -> tuple[str, ...]:
        """Stand before the attention functions of the sites and mark them.

        Args:
            model: Whose they are.
            stacks: With the sites of all prefixes.
            key_of: Gives the key of a stack's state beside the call.

        Returns:
            The files whose attention functions the sites call.
        """
        modules = (model.get_submodule(site.path) for stack in stacks for site in stack.sites)
        homes = tuple(dict.fromkeys(home for module in modules for home in internals.homes_of(module)))
        stand_before_attention(homes)
        for stack in stacks:
            for path in dict.fromkeys(site.path for site in stack.sites):
                module = model.get_submodule(path)
                sites = tuple(site for site in stack.sites if site.path == path)
                module.__dict__[MARK] = SiteMark(
                    sites,
                    key_of(stack),
                    turns=stack.turns.get(path, 1),
                    stands_in=stack.site_forward is not None,
                )
                if stack.site_forward is not None:
                    internals.stand_in(module, stack.site_forward, is_served)
        return homes

    def detach(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        """Undo :meth:`attach`."""
        for stack in stacks:
            for site in stack.sites:
                module = model.get_submodule(site.path)
                module.__dict__.pop(MARK, None)
                internals.stand_aside(module)
            internals.give_back_checkpointing(model.get_submodule(stack.path), KeepingCheckpoint)

    @staticmethod
    def _configs(model: nn.Module, attachment: Attachment) -> list[PreTrainedConfig]:
        stacks = [stack for stack in attachment.stacks if stack.site_forward is None]
        modules = [model.get_submodule(stack.path) for stack in stacks]
        modules = [module for module in modules if internals.has_config(module)]
        modules += [model.get_submodule(site.path) for stack in stacks for site in stack.sites]
        configs = (internals.config_of(module) for module in modules)
        return list({id(config): config for config in configs}.values())

    def before(
        self,
        module: nn.Module,
        stack: Stack,
        arguments: dict[str, Any],
        attachment: Served,
        flat: Any,
        *,
        kept: Kept | None,
    ) -> dict[str, Any]:
        """The stack's arguments with positions moved and the state added."""
        if internals.is_checkpointing(module) and internals.uses_reentrant_checkpointing(module):
            raise EngineError(
                "reentrant gradient checkpointing does not train every prefix (the graph of an MLP is gone when the "
                "second layer is recomputed); enable checkpointing with its keyword arguments set to "
                "{'use_reentrant': False}"
            )
        if stack.site_forward is None and internals.has_config(module):
            # Again at every call: set_attn_implementation() may have been called since.
            internals.check_wrappable(internals.config_of(module))
        cache = arguments.get("past_key_values") if stack.name == "decoder" else None
        if internals.held_prefix(cache) is not None:
            raise EngineError(
                "the cache passed in already holds a prefix, from to_cache() or the cache engine; it is "
                "for the bare model: call it under prefixkit.disabled(model), or after prefixkit.remove(model)"
            )
        real = behind = None
        if stack.positions is not None or _slides(stack, attachment) or attachment.config.infix:
            call = StackCall.read(arguments, cache.get_seq_length() if cache is not None else 0)
            behind = place_infix(arguments, call, attachment.host) if attachment.config.infix else None
            moved = True if behind is None else behind
            real = place_positions(module, stack, arguments, call, attachment.offset(stack), moved=moved)
        state = self._state(module, stack, attachment, flat, real, kept=kept)
        state.behind = behind
        return self.send(module, stack, arguments, attachment, state)

    def off(self, module: nn.Module, stack: Stack, arguments: dict[str, Any], attachment: Served) -> dict[str, Any]:
        """The stack's arguments while the prefix is disabled."""
        return self.send(module, stack, arguments, attachment, OFF)

    def after(self, module: nn.Module, stack: Stack, arguments: dict[str, Any], attachment: Served, output: Any) -> Any:
        """The stack's output, unchanged.

        Raises:
            EngineError: If none of its attention has asked for the prefix.
        """
        if stack.sites and not internals.may_drop_layers(module):
            state = arguments.get(STATE)
            if state is None and not torch.compiler.is_compiling():
                state = look_beside(attachment.state_key(stack))
            if state is not None and state.witness is not None and not state.witness.reached:
                raise EngineError(
                    f"no attention of the stack {stack.path!r} asked for its prefix: its adapter names modules that do "
                    "not call transformers' attention function"
                )
        return output

    @staticmethod
    def send(
        module: nn.Module, stack: Stack, arguments: dict[str, Any], attachment: Served, state: PrefixState
    ) -> dict[str, Any]:
        """Put ``state`` on its way to the attention."""
        if stack.hands_down:
            return {**arguments, STATE: state}
        put_beside(attachment.state_key(stack), state)
        if module.training:
            internals.replace_checkpointing(module, KeepingCheckpoint)
        return arguments

    @staticmethod
    def _state(
        module: nn.Module, stack: Stack, attachment: Served, flat: Any, real: torch.Tensor | None, *, kept: Kept | None
    ) -> PrefixState:
        config = attachment.config
        moved = None if real is None else real + config.num_virtual_tokens
        state = PrefixState(
            pieces={} if attachment.adds else once(kept, attachment, lambda: attachment.pieces(flat)),
            num_virtual_tokens=config.num_virtual_tokens,
            query_positions=moved,
            slide=config.window == "slide",
            dropout=config.prefix_dropout,
            shifts=attachment.shifts(stack),
            witness=None if torch.compiler.is_compiling() else Witness(),
            addition=attachment.addition(flat),
            places=frozenset(site.place for site in stack.sites),
            lengths=attachment.lengths(),
            kept=kept,
        )
        positions = stack.positions
        prefix_bias = positions.prefix_bias if isinstance(positions, PositionIds | RelativeBias) else None
        if prefix_bias is not None and moved is not None and attachment.shifts(stack):
            with placement.whole_weights(module):
                state.bias = prefix_bias(module, moved, config.num_virtual_tokens)
        return state


def _check_reachable(path: str, module: nn.Module, stack: Stack) -> None:
    if stack.site_forward is not None:
        if not internals.takes_what(module, stack.site_forward):
            takes = ", ".join(internals.parameter_names(type(module)))
            raise UnreachableAttentionError(
                f"the forward of {path!r}, {type(module).__name__}, takes {takes} in transformers {internals.VERSION}, "
                "which is not what its adapter was written for"
            )
    elif not internals.is_on_interface(module):
        raise UnreachableAttentionError(
            f"the attention of {path!r}, {type(module).__name__}, does not go through transformers' attention "
            f"interface (in transformers {internals.VERSION}), so the attention engine cannot reach it"
        )


def _check_masks(path: str, module: nn.Module) -> None:
    """Attention of a module's own has no names to choose from, but it may be FlashAttention, which takes no masks."""
    name = internals.attention_implementation_of(internals.config_of(module))
    if "flash" in name:
        raise UnreachableAttentionError(
            f"the attention of {path!r} was made as {name!r}, which takes no mask that the attention engine could "
            "widen; make the model with attn_implementation='eager', or pass engine='cache'"
        )


def _slides(stack: Stack, attachment: Served) -> bool:
    return attachment.config.window == "slide" and any(site.window for site in stack.sites)


def stand_before_attention(homes: Iterable[str]) -> None:
    """Put :func:`make_attention` before the attention functions of these files."""
    for home in homes:
        internals.stand_before_attention(home, make_attention)


def make_attention(name: str, original: internals.AttentionFunction) -> internals.AttentionFunction:
    """The attention function that stands before ``original``, the implementation ``name``."""
    is_torchs = internals.is_torchs_attention(original)

    def prefix_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        found = None if stands_in(module) else find_state(module, kwargs)
        if found is None:
            return original(module, query, key, value, attention_mask, **kwargs)
        site, state = found
        if state.read is not None:
            state.note(module, site, key, value)
            return original(module, query, key, value, attention_mask, **kwargs)
        if state.addition is not None:
            heads = heads_here(module, site, key, value, query)
            output, weights = original(module, query, key, value, attention_mask, **kwargs)
            return output + state.addition.of(query, kwargs, site, heads, module.training).transpose(1, 2), weights
        # Continuous batching writes its cache inside the attention, and the prefix is no part of that.
        key, value = internals.with_paged(module, key, value, kwargs)
        causal = attention_mask is None and _sdpa_would_be_causal(name, module, query.shape[2], kwargs)
        parts = is_torchs and state.is_seen_by_all(site) and pays(state.tokens(site), query, key)
        if parts and can_serve(query, key, value, attention_mask, kwargs):
            piece = piece_of(module, site, state, key, value, query)
            mask = None if attention_mask is None else state.additive(attention_mask, query.dtype)[..., : key.shape[2]]
            output = attend(query, key, value, piece, mask, causal=causal, scale=kwargs.get("scaling"))
            return output.transpose(1, 2).contiguous(), None
        attention_mask = _wider_mask(attention_mask, query, key, causal=causal, site=site, state=state)
        if attention_mask is not None and kwargs.get("is_causal"):
            kwargs["is_causal"] = False  # the mask says it; torch's own would stand at the upper left
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = _wider_bias(kwargs["position_bias"], site, state, query.shape[0])
        key, value = put_before(piece_of(module, site, state, key, value, query), key, value)
        return original(module, query, key, value, attention_mask, **kwargs)

    return prefix_attention


def _wider_mask(
    mask: Any, query: torch.Tensor, key: torch.Tensor, *, causal: bool, site: Site, state: PrefixState
) -> Any:
    """The mask with the prefix's columns; where the model gave none, ``None`` still if nothing is hidden."""
    if causal:
        mask = state.causal_mask(query.shape[2], key.shape[2], query.device)
    elif mask is None and state.seen(site) is not None:
        mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    return None if mask is None else state.widened(mask, site, query.shape[0])


def _wider_bias(bias: torch.Tensor, site: Site, state: PrefixState, batch: int) -> torch.Tensor:
    return widen_bias(bias, state.bias_of(site), state.tokens(site), batch)


def _sdpa_would_be_causal(name: str, module: nn.Module, queries: int, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa, given no mask, would make a causal one of its own.

    It aligns that mask at the upper left, so with a prefix in front a token would not even see
    itself. Eager attention without a mask sees everything, as does a single query.
    """
    asked = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if asked is None else asked
    return name == "sdpa" and queries > 1 and bool(causal)
