"""Keys and values that the base itself makes of what it reads: where a prefix can start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.adapter import Stack
from prefixkit.as_it_was import as_it_was
from prefixkit.attention_engine import AttentionEngine, UnreachableAttentionError
from prefixkit.errors import ConfigError, PrefixkitError
from prefixkit.layout import KeyValue
from prefixkit.prefix_state import PrefixState, take_away

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from prefixkit.attachment import Attachment


def read(model: PreTrainedModel, attachment: Attachment, inputs: Mapping[str, Any], tokens: int) -> torch.Tensor:
    """The flat prefix ``(tokens, width)`` that one forward pass of the base makes of ``inputs``.

    Keys are as the attention gets them: rotated, from tokens that stand at positions 0, 1, 2, …

    Args:
        model: The bare model, which stays as it is.
        attachment: Not yet on the model; it says which sites are read.
        inputs: Arguments of the model's ``forward``, of one row.
        tokens: How many keys that has to give.

    Raises:
        ConfigError: If the model does not run with them, or its sites keep another number of keys.
    """
    reads = _through_attention if _is_reachable(model, attachment) else _through_cache
    try:
        with internals.uncompiled_attention(model):
            flat = join(attachment, reads(model, attachment, inputs))
    except PrefixkitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"this {type(model).__name__} does not run with {', '.join(inputs)} to start its prefix from: "
            f"{type(error).__name__}: {error}; start from a flat prefix or a cache, or pass init='random'"
        ) from error
    if len(flat) != tokens:
        raise ConfigError(
            f"this {type(model).__name__} keeps {len(flat)} keys of {tokens} tokens, so they make no prefix"
        )
    return flat


def join(attachment: Attachment, pieces: Mapping[str, KeyValue]) -> torch.Tensor:
    """The flat prefix ``(tokens, width)`` of ``pieces`` by place, in float32 and with a memory of its own.

    Raises:
        ConfigError: If a site is missing, or has another number of keys than the first.
    """
    for site in attachment.layout.sites:
        if site.place not in pieces:
            raise ConfigError(f"no keys and values for {site.path!r} ({site.stack} attention) to start its prefix from")
    lengths = {site.path: pieces[site.place].key.shape[1] for site in attachment.layout.sites}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"the sites have numbers of keys that differ, so they make no prefix: {lengths}")
    device = next(attachment.encoder.parameters()).device
    parts = (pieces[site.place] for site in attachment.layout.sites)
    return attachment.layout.join([KeyValue(*(part.to(device).float() for part in pair)) for pair in parts])


def of_cache(cache: Cache, attachment: Attachment) -> dict[str, KeyValue]:
    """Keys and values of a native cache's first row, by the site's place.

    Raises:
        ConfigError: If it has no layer for a site, or the layer's heads are others.
    """
    own, cross = internals.self_and_cross(cache)
    pieces = {}
    for site in attachment.layout.sites:
        part = {"decoder": own, "cross": cross}.get(site.stack)
        layer: Any = part.layers[site.layer] if part is not None and site.layer < len(part.layers) else None
        key, value = (getattr(layer, name, None) for name in ("keys", "values"))
        if isinstance(key, torch.Tensor) and (len(key) != 1 or getattr(layer, "is_compileable", False)):
            raise ConfigError(
                f"a prefix starts from a dynamic cache of one row; this one has {len(key)} in a {type(layer).__name__}"
            )
        if isinstance(key, torch.Tensor) and layer.get_seq_length() != key.shape[2]:
            raise ConfigError(
                f"the cache has read {layer.get_seq_length()} tokens and keeps {key.shape[2]} of {site.path!r}: its "
                "window has slid past the others, and what is left stands at other positions than a prefix"
            )
        if not isinstance(key, torch.Tensor) or not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"the cache has no keys and values for {site.path!r} ({site.stack} attention); pass "
                "stacks= and layers= with what it has"
            )
        given = (key.shape[1], key.shape[3], value.shape[3])
        if given != (site.kv_heads, site.key_dim, site.value_dim):
            raise ConfigError(
                f"the cache has {given[0]} heads of ({given[1]}) and ({given[2]}) for {site.path!r}, and the model "
                f"{site.kv_heads} of ({site.key_dim}) and ({site.value_dim})"
            )
        pieces[site.place] = KeyValue(key[0].detach(), value[0].detach())
    return pieces


def _is_reachable(model: PreTrainedModel, attachment: Attachment) -> bool:
    try:
        AttentionEngine().check(model, attachment)
    except UnreachableAttentionError:
        return False
    return True


def _through_cache(model: PreTrainedModel, attachment: Attachment, inputs: Mapping[str, Any]) -> Mapping[str, KeyValue]:
    with as_it_was(model):
        cache = internals.cache_in(_body(model)(**inputs, use_cache=True))
    if cache is None:
        raise ConfigError(f"this {type(model).__name__} returns no cache to start its prefix from")
    return of_cache(cache, attachment)


def _through_attention(
    model: PreTrainedModel, attachment: Attachment, inputs: Mapping[str, Any]
) -> Mapping[str, KeyValue]:
    pieces: dict[str, KeyValue] = {}
    with _read_into(pieces, model, attachment), as_it_was(model):
        _body(model)(**inputs)
    return pieces


def _body(model: PreTrainedModel) -> nn.Module:
    """The model without its head, which may want more than a text."""
    body: nn.Module = model.base_model
    return body


@contextmanager
def _read_into(pieces: dict[str, KeyValue], model: PreTrainedModel, attachment: Attachment) -> Iterator[None]:
    """Inside, the attention of all sites notes its keys and values in ``pieces``."""
    engine = AttentionEngine()
    handles: list[Any] = []
    try:
        engine.attach(model, attachment.stacks, attachment.state_key)
        for stack in attachment.stacks:
            module = model.get_submodule(stack.path)
            handles.append(module.register_forward_pre_hook(_sender(stack, attachment, pieces), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        engine.detach(model, attachment.stacks)
        for stack in attachment.stacks:
            take_away(attachment.state_key(stack))


def _sender(stack: Stack, attachment: Attachment, pieces: dict[str, KeyValue]) -> Any:
    state = PrefixState(pieces={}, num_virtual_tokens=0, query_positions=None, slide=False, dropout=0.0, read=pieces)

    def send(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs}
        state.turns.clear()
        return (), AttentionEngine.send(module, stack, arguments, attachment, state)

    return send
