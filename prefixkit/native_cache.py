"""The prefix as the architecture's own key-value cache, for the bare model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prefixkit import placement, transformers_internals as internals
from prefixkit.cache_engine import check_cacheable, fill_cache
from prefixkit.errors import ConfigError, EngineError
from prefixkit.layout import KeyValue
from prefixkit.prefixes import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


def to_cache(model: PreTrainedModel, batch_size: int = 1) -> Cache:
    """The prefix as a native cache from which the bare model goes on.

    A decoder-only model gets a ``DynamicCache`` of length P. An encoder-decoder gets an
    ``EncoderDecoderCache`` with the decoder's and the cross-attention's prefix; its decoder appends
    the encoder's states to the latter. The caller of the bare model passes

    * masks that are wider by P: ``attention_mask`` of a decoder-only model (or the
      ``decoder_attention_mask``), and ``encoder_attention_mask`` of a bare decoder;
    * for an encoder prefix, the encoder states of ``model.get_encoder()`` called with the prefix on.

    Example::

        cache = prefixkit.to_cache(model, batch_size=2)
        prefixkit.remove(model)
        model(input_ids=ids, past_key_values=cache)  # two rows, without padding: no mask is needed

    Args:
        model: A model with a prefix.
        batch_size: Rows of the cache.

    Returns:
        A new cache, detached, in the dtype of the model, on its device.

    Raises:
        AttachmentError: If the model has no prefix.
        ConfigError: If ``batch_size`` is below 1.
        EngineError: If the policies cannot be expressed: ``positions="none"``, since a bare model
            counts positions from the cache's length, a pinned prefix in sliding windows, a choice
            of layers, or a prefix on an encoder only.
    """
    attachment = require(model).attachment
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
    check_cacheable(attachment)
    decoder = next(stack for stack in attachment.stacks if stack.name == "decoder")
    if attachment.config.positions == "none" and any(site.stack == "decoder" for site in decoder.sites):
        raise EngineError(
            "a bare model counts positions from the length of its cache, so positions='none' cannot be expressed "
            "in one; apply the prefix with positions='shift'"
        )
    module = model.get_submodule(decoder.path)
    with torch.no_grad():
        flat = attachment.flat_of(model).detach()
    pieces = attachment.prepared(flat, dtype=placement.compute_dtype(module), training=False)
    # Own memory: a caller may write into the cache, or train the prefix further.
    pieces = {place: KeyValue(key.clone(), value.clone()) for place, (key, value) in pieces.items()}
    cache = internals.new_cache(internals.config_of(module))
    fill_cache(cache, attachment, pieces, batch_size)
    return cache
