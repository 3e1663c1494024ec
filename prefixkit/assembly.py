"""From a configuration to a finished attachment, checked against the model, which stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import Adapter, PositionIds, RelativeBias, Site, Stack
from prefixkit.additions import add_gate, check_addition, memory_width
from prefixkit.attachment import Attachment
from prefixkit.attention_engine import AttentionEngine, UnreachableAttentionError
from prefixkit.cache_engine import CacheEngine, without_the_other
from prefixkit.discovery import installed
from prefixkit.embeddings import check_reads
from prefixkit.errors import (
    GUIDE,
    AttachmentError,
    ConfigError,
    EngineError,
    MethodError,
    PluginError,
    UnsupportedModelError,
)
from prefixkit.frozen import add_frozen
from prefixkit.head import input_embeddings
from prefixkit.hooks import carries_prefix
from prefixkit.infix import check_infix
from prefixkit.layout import Layout
from prefixkit.method import EMBEDDINGS, MEMORY, PREFIX, Method, PrefixShape
from prefixkit.prefix_config import PrefixConfig
from prefixkit.prefix_encoder import flat_encoder


def check_model(model: object) -> str:
    """The model's type, if it is a model that can take a prefix now.

    Raises:
        UnsupportedModelError: If it is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers model, got {type(model).__name__}; pass the PreTrainedModel itself, "
            "before it is wrapped or compiled"
        )
    return str(model.config.model_type)


def build(
    model: PreTrainedModel, config: PrefixConfig, adapter: Adapter | None, method: Method | None = None
) -> Attachment:
    """A finished attachment for ``config``, not yet on the model, which stays as it is.

    ``adapter`` and ``method`` overrule the installed ones.
    """
    _check_spread(model)
    adapter = adapter or installed().adapter_for(config.model_type)
    stacks = _select(model, stacks_of(model, adapter), config)
    for stack in stacks:
        if carries_prefix(model.get_submodule(stack.path)):
            raise AttachmentError(
                f"the {stack.name} of this {type(model).__name__} already carries a prefix, applied through another "
                "model object that shares it; call prefixkit.remove on that one first"
            )
    layout = Layout(site for stack in stacks for site in stack.sites)
    method = None if config.folded else method or installed().method(config.method)
    gives = PREFIX if method is None else method.gives
    # A memory has no tokens behind which any could be moved.
    moves = gives != MEMORY and any(stack.sites and stack.positions is not None for stack in stacks)
    attachment = Attachment(
        config=replace(config, sites=layout.sites, positions=config.positions if moves else "none"),
        stacks=stacks,
        layout=layout,
        encoder=_encoder(config, _shape(model, config, layout), method).to(placement.real_device(model)),
        engine=CacheEngine() if config.engine == "cache" else AttentionEngine(),
        gives=gives,
    )
    if config.engine == "auto":
        _choose_engine(model, attachment)
    else:
        attachment.engine.check(model, attachment)
    _check_method(attachment)
    if config.gate:
        add_gate(attachment.encoder, layout)
    if config.num_frozen_tokens:
        add_frozen(attachment.encoder, config.num_frozen_tokens)
    return attachment


def _check_spread(model: PreTrainedModel) -> None:
    """Raise where the weights are spread over processes in a way that a prefix cannot follow."""
    if placement.is_fully_sharded(model):
        raise UnsupportedModelError(
            "fully_shard has spread the weights of this model over processes already, and would not know the prefix; "
            "apply or load it first, then shard"
        )
    if (getattr(model, "tp_size", None) or 1) > 1 and not internals.spreads_visibly():
        raise UnsupportedModelError(
            f"transformers {internals.VERSION} spreads a model over processes (tensor parallel) in a way that its "
            "weights do not show, so a prefix cannot follow; use transformers 5.20 or later, or torch's "
            "parallelize_module"
        )


def _check_method(attachment: Attachment) -> None:
    """Raise where what the method gives cannot be put into the model."""
    config, stacks = attachment.config, attachment.stacks
    if attachment.gives == EMBEDDINGS:
        check_reads(stacks)
    if attachment.gives == MEMORY and (config.gate or config.infix or config.num_virtual_tokens != 1):
        raise ConfigError(
            f"method {config.method!r} has no virtual tokens and starts at the base model by itself; pass "
            "num_virtual_tokens=1, gate=False and infix=False"
        )
    if config.infix:
        check_infix(config, stacks)
    if attachment.adds:
        what = "gate=True" if config.gate else f"method {config.method!r}"
        check_addition(what, config, stacks)


def _shape(model: PreTrainedModel, config: PrefixConfig, layout: Layout) -> PrefixShape:
    """All that a method may want to know."""
    return PrefixShape(
        num_virtual_tokens=config.num_virtual_tokens,
        width=layout.width,
        hidden_size=_hidden_size(model, layout),
        embedding_size=getattr(input_embeddings(model), "embedding_dim", 0),
        memory_size=memory_width(layout),
        halves=tuple((site.kv_heads * site.key_dim, site.kv_heads * site.value_dim) for site in layout.sites),
    )


def _hidden_size(model: PreTrainedModel, layout: Layout) -> int:
    """Width of the model's states, or where its config has none, of its first site's keys."""
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) else layout.sites[0].kv_heads * layout.sites[0].key_dim


def _choose_engine(model: PreTrainedModel, attachment: Attachment) -> None:
    """The attention engine, unless only the cache engine can serve the model.

    Raises:
        EngineError: If neither can, with both reasons.
    """
    try:
        attachment.engine.check(model, attachment)
    except UnreachableAttentionError as no_attention:
        attachment.engine = CacheEngine()
        try:
            attachment.engine.check(model, attachment)
        except EngineError as no_cache:
            raise EngineError(f"{no_attention}; and {without_the_other(no_cache)}") from no_cache


def _encoder(config: PrefixConfig, shape: PrefixShape, method: Method | None) -> nn.Module:
    """The method's prefix encoder, or without one that of a folded prefix."""
    if method is None:
        return flat_encoder(torch.zeros(shape.num_virtual_tokens, shape.width))
    encoder = method.build(shape, method.resolve(config.method_options))
    with torch.no_grad():
        given, expected = tuple(encoder().shape), _expected(method.gives, shape)
    if given != expected:
        raise MethodError(f"method {config.method!r} gives a {method.gives} of {given}; this model needs {expected}")
    return encoder


def _expected(gives: str, shape: PrefixShape) -> tuple[int, int]:
    if gives == MEMORY:
        return 1, shape.memory_size
    return shape.num_virtual_tokens, shape.embedding_size if gives == EMBEDDINGS else shape.width


def stacks_of(model: PreTrainedModel, adapter: Adapter) -> list[Stack]:
    """The adapter's stacks, checked against the modules of the model."""
    stacks = list(adapter.stacks(model))
    if not any(stack.sites for stack in stacks) or any(stack.path is None for stack in stacks):
        raise UnsupportedModelError(
            f"the adapter for {model.config.model_type!r} finds no attention in this {type(model).__name__}; "
            f"see {GUIDE}"
        )
    names = {name for name, _ in model.named_modules()}
    for path in [path for stack in stacks for path in (stack.path, *(site.path for site in stack.sites))]:
        if path not in names:
            raise PluginError(
                f"the adapter for {model.config.model_type!r} names {path!r}, which {type(model).__name__} lacks"
            )
    for stack in stacks:
        _check_positions(model, stack)
        for site in stack.sites:
            _check_place(site, stack)
    return stacks


def _check_positions(model: PreTrainedModel, stack: Stack) -> None:
    """Ids that a caller may pass are never dropped without a word."""
    takes_ids = internals.takes(model.get_submodule(stack.path), "position_ids")
    ignored = isinstance(stack.positions, RelativeBias) and stack.positions.ignores_ids
    if takes_ids and not ignored and not isinstance(stack.positions, PositionIds | None):
        raise PluginError(
            f"the {stack.name} stack {stack.path!r} of {type(model).__name__} takes position_ids, and the adapter "
            f"states {type(stack.positions).__name__}; state PositionIds"
        )


def _check_place(site: Site, stack: Stack) -> None:
    """A site is served by the stack that it stands in, so it must be part of it."""
    inside = not stack.path or site.path.startswith(stack.path + ".")
    if not inside or (site.stack == "encoder") != (stack.name == "encoder"):
        raise PluginError(
            f"the {site.stack} site {site.path!r} stands in the {stack.name} stack {stack.path!r}; an encoder site "
            "belongs to the encoder's stack, decoder and cross sites to the decoder's, with a path inside the stack's"
        )


def _select(model: PreTrainedModel, stacks: list[Stack], config: PrefixConfig) -> tuple[Stack, ...]:
    """The stacks with only the sites that ``stacks=`` and ``layers=`` ask for.

    One that keeps none still counts its positions from the mask, so that a left-padded row equals
    the row alone.
    """
    every = [site for stack in stacks for site in stack.sites]
    _check_asked("stacks", config.stacks, {site.stack for site in every}, model)
    _check_asked("layers", config.layers, {site.layer for site in every}, model)
    chosen = tuple(_chosen(model, stack, config) for stack in stacks)
    layers = {site.layer for stack in chosen for site in stack.sites}
    _check_asked("layer_tokens", dict(config.layer_tokens) or None, layers, model)
    if not any(stack.sites for stack in chosen):
        raise ConfigError(
            f"stacks={config.stacks} and layers={config.layers} leave no attention of {type(model).__name__}"
        )
    return chosen


def _chosen(model: PreTrainedModel, stack: Stack, config: PrefixConfig) -> Stack:
    """The stack with the sites that are asked for, and what follows from all that it has."""
    turns = {path: count for path, count in Counter(site.path for site in stack.sites).items() if count > 1}
    return replace(
        stack,
        sites=tuple(site for site in stack.sites if _asked(site, config)),
        turns=turns,
        # Turns are counted beside the call, where a layer that is computed again finds its own.
        hands_down=stack.hands_down and not turns and _can_hand_down(model, stack),
    )


def _can_hand_down(model: PreTrainedModel, stack: Stack) -> bool:
    """Whether a keyword argument can get to the attention; some versions drop in a layer what its stack accepts."""
    if stack.site_forward is not None or not internals.takes_any_keyword(model.get_submodule(stack.path)):
        return False
    return all(internals.can_hand_down(model, stack.path, site.path) for site in stack.sites)


def _asked(site: Site, config: PrefixConfig) -> bool:
    by_stack = config.stacks is None or site.stack in config.stacks
    return by_stack and (config.layers is None or site.layer in config.layers)


def _check_asked(field: str, asked: Iterable[Any] | None, present: set[Any], model: nn.Module) -> None:
    missing = [value for value in asked or () if value not in present]
    if missing or (asked is not None and not tuple(asked)):
        has = ", ".join(map(str, sorted(present)))
        raise ConfigError(f"{field} asks for {missing or 'nothing'}, and {type(model).__name__} has {has}")
