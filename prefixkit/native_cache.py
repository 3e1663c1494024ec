"""The prefix as the architecture's own key-value cache, for the bare model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, overload

import torch

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import Stack
from prefixkit.cache_engine import check_cacheable, fill_cache
from prefixkit.errors import ConfigError, EngineError, closest
from prefixkit.layout import KeyValue
from prefixkit.prefixes import require
from prefixkit.tensor_parallel import check_whole_heads
from prefixkit.turning import moving_sites, turned

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from prefixkit.attachment import Attachment

KINDS: Final = ("dynamic", "static", "tuple")

Kind = Literal["dynamic", "static", "tuple"]
LegacyCache = tuple[tuple[torch.Tensor, ...], ...]
"""Keys and values layer by layer, ``(batch_size, kv_heads, P, dim)`` each."""


@overload
def to_cache(model: PreTrainedModel, batch_size: int = 1, *, kind: Literal["dynamic"] = "dynamic") -> Cache: ...
@overload
def to_cache(
    model: PreTrainedModel,
    batch_size: int = 1,
    *,
    kind: Literal["static"],
    max_cache_len: int,
    source_len: int | None = None,
) -> Cache: ...
@overload
def to_cache(model: PreTrainedModel, batch_size: int = 1, *, kind: Literal["tuple"]) -> LegacyCache: ...
def to_cache(
    model: PreTrainedModel,
    batch_size: int = 1,
    *,
    kind: Kind = "dynamic",
    max_cache_len: int | None = None,
    source_len: int | None = None,
) -> Cache | LegacyCache:
    """The prefix as a native cache from which the bare model goes on.

    ``kind`` says which:

    * ``"dynamic"``: a ``DynamicCache`` of length P. An encoder-decoder gets an ``EncoderDecoderCache`` with the
      decoder's and the cross-attention's prefix; its decoder appends the encoder's states to the latter.
    * ``"static"``: a ``StaticCache`` of ``max_cache_len`` places, of which the prefix takes the first P, for
      ``torch.compile`` and ``torch.export``. An encoder-decoder gets one for cross-attention too, with room for
      the prefix and ``source_len`` encoder states.
    * ``"tuple"``: for each layer ``(key, value)``, as old models and exporters take it; where the prefix has
      cross-attention ``(key, value, cross key, cross value)``, the latter two without any encoder states.

    The caller of the bare model passes

    * masks that are wider by P: ``attention_mask`` of a decoder-only model (or the
      ``decoder_attention_mask``), and ``encoder_attention_mask`` of a bare decoder;
    * for an encoder prefix, the encoder states of ``model.get_encoder()`` called with the prefix on;
    * for ``generate`` of a decoder-only model, P token ids more in front of the text: any, since nobody reads them.

    Example::

        cache = prefixkit.to_cache(model, batch_size=2)
        prefixkit.remove(model)
        model(input_ids=ids, past_key_values=cache)  # two rows, without padding: no mask is needed

    Under ``positions="none"`` the keys of a rotary model are turned by P positions, since a bare model counts
    from the cache's length. That is exact. Models with other positions are refused.

    Args:
        model: A model with a prefix.
        batch_size: Rows of the cache; for beam search rows × beams.
        kind: ``"dynamic"``, ``"static"`` or ``"tuple"``.
        max_cache_len: Of a static cache: places for P virtual tokens and all tokens of the text, as in
            transformers' ``StaticCache``.
        source_len: Of a static cache for a decoder with cross-attention: how many states its encoder gives.

    Returns:
        A new cache, detached, in the dtype of the model, on its device.

    Raises:
        AttachmentError: If the model has no prefix.
        ConfigError: If ``batch_size`` is below 1, ``kind`` is unknown, or a length is missing, too small or
            given for a cache that grows.
        EngineError: If the prefix cannot be expressed: ``positions="none"`` where keys cannot be turned, a
            pinned prefix in sliding windows, a choice of layers, a gate, a prefix on an encoder only, heads spread
            by tensor parallel, or, in transformers before 5.5, a static cache for cross-attention.
    """
    attachment = require(model).attachment
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}{closest(kind, KINDS)}; possible: {', '.join(KINDS)}")
    check_cacheable(attachment)
    check_whole_heads(model, attachment.stacks)
    decoder = next(stack for stack in attachment.stacks if stack.name == "decoder")
    module = model.get_submodule(decoder.path)
    crosses = _crosses(module, attachment)
    _check_lengths(kind, attachment, max_cache_len, source_len, crosses=crosses)
    flat = _as_text_in_front(model, attachment, decoder)
    pieces = attachment.prepared(flat, dtype=placement.compute_dtype(module), training=False)
    # Own memory: a caller may write into the cache, or train the prefix further.
    pieces = {place: KeyValue(key.clone(), value.clone()) for place, (key, value) in pieces.items()}
    if kind == "tuple":
        return _legacy(attachment, pieces, batch_size)
    config = internals.config_of(module)
    if max_cache_len is None:
        cache = internals.new_cache(config)
    else:
        room = _in_cross(attachment) + source_len if source_len is not None else None
        cache = internals.new_static_cache(config, max_cache_len, room)
    fill_cache(cache, attachment, pieces, batch_size)
    if kind == "static":
        _check_filled(cache, attachment, decoder)
    return cache


def _as_text_in_front(model: PreTrainedModel, attachment: Attachment, decoder: Stack) -> torch.Tensor:
    """The flat prefix for a model that counts its text from P."""
    if attachment.config.positions == "shift" or not moving_sites(decoder):
        with torch.no_grad():
            return attachment.flat_of(model).detach()
    try:
        return turned(model, "shift")
    except EngineError as error:
        raise EngineError(
            "a bare model counts positions from the length of its cache, so positions='none' cannot be expressed "
            f"in one: {error}"
        ) from error


def _check_lengths(
    kind: Kind, attachment: Attachment, max_cache_len: int | None, source_len: int | None, *, crosses: bool
) -> None:
    tokens = attachment.config.num_virtual_tokens
    if kind != "static":
        if max_cache_len is not None or source_len is not None:
            raise ConfigError(f"max_cache_len and source_len are for kind='static'; a {kind} cache grows with the text")
        return
    if max_cache_len is None or max_cache_len <= tokens:
        raise ConfigError(
            f"max_cache_len is {max_cache_len}; a static cache needs room for the {tokens} virtual tokens and the "
            f"longest text together, {tokens + 1} or more"
        )
    if not crosses and source_len is not None:
        raise ConfigError(f"source_len is {source_len}, but this model has no cross-attention; leave it out")
    if crosses and (source_len is None or source_len < 1):
        raise ConfigError(
            f"source_len is {source_len}; a static cache for cross-attention needs to know how many states the "
            "encoder gives, 1 or more"
        )
    if crosses and not internals.static_layers_append():
        raise EngineError(
            f"in transformers {internals.VERSION} a decoder writes its encoder's states over what stands in a static "
            "cache for cross-attention; use transformers 5.5 or later, or kind='dynamic'"
        )


def _check_filled(cache: Cache, attachment: Attachment, decoder: Stack) -> None:
    """Refuse a static cache of another depth, or one that counts keys which are not zero and misses some of ours."""
    sites = moving_sites(decoder)
    own, _ = internals.self_and_cross(cache)
    layers = len(own.layers)
    if sites and layers != len(sites):
        raise EngineError(f"the cache that transformers makes for this model has {layers} layers, for {len(sites)}")
    held, wanted = int(own.get_seq_length()) if sites else 0, attachment.config.num_virtual_tokens if sites else 0
    if held != wanted:
        raise EngineError(
            f"transformers {internals.VERSION} counts {held} tokens in a static cache of {wanted}, since it takes keys "
            "of zeros for empty places; train the prefix first, or use kind='dynamic'"
        )


def _crosses(decoder: torch.nn.Module, attachment: Attachment) -> bool:
    """Whether the decoder attends to an encoder."""
    config = internals.config_of(decoder)
    with_encoder = config.is_encoder_decoder or getattr(config, "add_cross_attention", False)
    return bool(_in_cross(attachment) or with_encoder)


def _in_cross(attachment: Attachment) -> int:
    """Virtual tokens in cross-attention."""
    crosses = any(site.stack == "cross" for site in attachment.layout.sites)
    return attachment.config.num_virtual_tokens if crosses else 0


def _legacy(attachment: Attachment, pieces: dict[str, KeyValue], batch: int) -> LegacyCache:
    """A tuple for each layer, its self-attention first."""
    layers: dict[int, list[torch.Tensor]] = {}
    for site in attachment.layout.sites:
        if site.stack != "encoder":
            rows = (part.expand(batch, -1, -1, -1).clone() for part in pieces[site.place])
            layers.setdefault(site.layer, []).extend(rows)
    return tuple(tuple(layers[layer]) for layer in sorted(layers))
