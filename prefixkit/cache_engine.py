"""The cache engine: K and V enter through the architecture's own key-value cache.

It serves architectures whose attention cannot be wrapped, and it builds what leaves the library
(:func:`prefixkit.to_cache`). A pre-filled cache cannot be right in every mode. Where it cannot,
this engine raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import PositionIds, RelativeBias, Stack
from prefixkit.call import StackCall
from prefixkit.errors import EngineError
from prefixkit.layout import KeyValue
from prefixkit.method import EMBEDDINGS
from prefixkit.positions import place_positions
from prefixkit.tensor_parallel import check_whole_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers.cache_utils import Cache

    from prefixkit.attachment import Attachment
    from prefixkit.kept import Kept
    from prefixkit.mixture import Served

USE_ATTENTION = "use engine='attention'"


def without_the_other(error: EngineError) -> str:
    """What a check of this engine said, for a model that the attention engine cannot serve."""
    return str(error).removesuffix(f"; {USE_ATTENTION}").replace(f"{USE_ATTENTION}, or ", "")


class CacheEngine:
    """Fills the cache a decoder is called with, and widens its masks.

    Wrong by its nature, and refused: an encoder prefix, gradient checkpointing, packed sequences,
    static, quantized and offloaded caches, prepared 4-D masks, a pinned prefix in sliding windows.
    """

    name = "cache"

    def check(self, model: nn.Module, attachment: Attachment) -> None:
        """Raise if the stacks or policies asked for cannot be served through a cache."""
        check_cacheable(attachment)
        check_whole_heads(model, attachment.stacks)
        for stack in attachment.stacks:
            if stack.name == "decoder" and not internals.takes_cache(model.get_submodule(stack.path)):
                raise EngineError(
                    f"the stack {stack.path!r} has no parameter for a native cache, so it takes none that could "
                    f"hold a prefix; {USE_ATTENTION}"
                )
        if any(site.stack == "encoder" for site in attachment.layout.sites):
            raise EngineError(
                "the cache engine gives an encoder no prefix, since encoders take no cache; "
                f"{USE_ATTENTION}, or pass stacks=('decoder', 'cross')"
            )

    def attach(self, model: nn.Module, stacks: Sequence[Stack], key_of: Callable[[Stack], str]) -> tuple[str, ...]:
        """Nothing to prepare: hooks on the stacks do it all."""
        return ()

    def detach(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        """Nothing to undo."""

    def before(
        self,
        module: nn.Module,
        stack: Stack,
        arguments: dict[str, Any],
        attachment: Served,
        flat: Any,
        *,
        kept: Kept | None,  # the cache keeps it
    ) -> dict[str, Any]:
        """The stack's arguments with a filled cache, wider masks and moved positions."""
        if internals.is_checkpointing(module):
            raise EngineError(f"the cache engine cannot train under gradient checkpointing; {USE_ATTENTION}")
        tokens = attachment.config.num_virtual_tokens
        cache = arguments.get("past_key_values")
        cross = arguments.get("encoder_hidden_states") is not None
        if cache is None:
            cache = internals.new_cache(internals.config_of(module), cross=cross)
        held = _held(cache, attachment)
        cache = internals.with_cross(cache) if cross else cache
        call = StackCall.read(arguments, held)
        _check_mask(arguments, call)
        _check_padding(stack, call, attachment)
        offset = attachment.offset(stack)
        # Without a 2-D mask, what the caller says of positions must be what the cache implies.
        if isinstance(stack.positions, PositionIds) and call.mask is None:
            _check_positions(arguments.get("position_ids"), call, stack.positions.offset)
        place_positions(module, stack, arguments, call, offset)
        if arguments.get("cache_position") is not None and _has_self_sites(attachment):
            # Places in the cache, which transformers before 5.4 makes masks from; not those of the tokens.
            arguments["cache_position"] = arguments["cache_position"] + tokens
        if internals.held_prefix(cache) is None:
            dtype = placement.compute_dtype(module)
            pieces = attachment.prepared(flat, dtype=dtype, training=module.training)
            fill_cache(cache, attachment, pieces, call.batch)
        _widen_masks(module, arguments, call, attachment)
        return {**arguments, "past_key_values": cache}

    def off(self, module: nn.Module, stack: Stack, arguments: dict[str, Any], attachment: Served) -> dict[str, Any]:
        """The stack's arguments while the prefix is disabled, unchanged."""
        return arguments

    def after(self, module: nn.Module, stack: Stack, arguments: dict[str, Any], attachment: Served, output: Any) -> Any:
        """The stack's output, without the cache that we, not the caller, asked for."""
        asked = arguments.get("use_cache")
        if getattr(internals.config_of(module), "use_cache", True) if asked is None else asked:
            return output
        if isinstance(output, tuple):
            return tuple(part for part in output if internals.held_prefix(part) is None)
        ours = [name for name, value in output.items() if internals.held_prefix(value) is not None]
        return type(output)(**{name: value for name, value in output.items() if name not in ours}) if ours else output


def check_cacheable(attachment: Attachment) -> None:
    """Raise if the prefix cannot be expressed in a native cache.

    Raises:
        EngineError: For a window policy, a position policy or a choice of layers that it cannot hold.
    """
    sites = [site for site in attachment.layout.sites if site.stack != "encoder"]
    if not sites:
        raise EngineError("this prefix has encoder sites only, and an encoder takes no cache")
    if attachment.config.infix:
        raise EngineError(f"a native cache cannot hide an infix from the text before it; {USE_ATTENTION}")
    if attachment.adds:
        raise EngineError(f"a native cache holds keys and values only, no gate and no memory; {USE_ATTENTION}")
    if attachment.gives == EMBEDDINGS and attachment.engine.name == "cache":
        raise EngineError(f"the cache engine has no way to read embeddings; {USE_ATTENTION}")
    _check_policies(attachment)
    if not all(stack.caches for stack in attachment.stacks if stack.name == "decoder"):
        raise EngineError(
            "the native cache of this model does not keep what its attention is given, one layer for each site (it "
            f"keeps latents, shares layers, or has layers of another kind), so it holds no prefix; {USE_ATTENTION}"
        )
    if attachment.config.layers is not None or attachment.config.layer_tokens:
        raise EngineError(
            "a native cache needs a prefix in every layer, of one length; apply the prefix without layers= and "
            "layer_tokens="
        )


def _check_policies(attachment: Attachment) -> None:
    """Raise for positions and windows that the native cache cannot have."""
    uncounted = [stack for stack in attachment.stacks if stack.name == "decoder" and stack.positions is None]
    if uncounted and _has_self_sites(attachment):
        raise EngineError(
            "this model may count positions from the length of its cache, and its adapter knows no way to tell it "
            f"others; {USE_ATTENTION}"
        )
    if attachment.config.window == "pinned" and any(site.window for site in attachment.layout.sites):
        raise EngineError(
            "a native cache cannot keep a prefix in sight of a sliding window; "
            f"{USE_ATTENTION}, or apply the prefix with window='slide'"
        )
    relative = any(isinstance(stack.positions, RelativeBias) for stack in attachment.stacks)
    if attachment.config.positions == "none" and relative and _has_self_sites(attachment):
        raise EngineError(
            "positions='none' gives the prefix no relative-position bias, which a native cache cannot express; "
            f"{USE_ATTENTION}, or positions='shift'"
        )


def fill_cache(cache: Cache, attachment: Served, pieces: dict[str, KeyValue], batch: int) -> None:
    """Put the prefix of decoder and cross sites into an empty native cache.

    Args:
        cache: An empty cache of the architecture's kind.
        attachment: Whose sites the pieces belong to.
        pieces: K and V by the site's place, in the dtype of the model's keys.
        batch: Rows of the cache.
    """
    own, cross = internals.self_and_cross(cache)
    layers = range(0)
    for site in attachment.layout.sites:
        part = {"decoder": own, "cross": cross}.get(site.stack)
        if part is None:
            continue
        key, value = (tensor.expand(batch, -1, -1, -1) for tensor in pieces[site.place])
        part.update(key, value, site.layer)
        if site.stack == "cross":
            layers = range(site.layer + 1)
    internals.set_not_updated(cache, layers)
    internals.mark_prefix(cache, attachment.identity)


def _has_self_sites(attachment: Served) -> bool:
    return any(site.stack == "decoder" for site in attachment.layout.sites)


def _has_cross_sites(attachment: Served) -> bool:
    return any(site.stack == "cross" for site in attachment.layout.sites)


def _held(cache: Any, attachment: Served) -> int:
    """Real tokens in ``cache``, beside the virtual ones if it holds the prefix.

    Refuses a cache that is not ours to fill or to go on from.
    """
    if not internals.is_dynamic(cache):
        raise EngineError(f"the cache engine takes a DynamicCache only, got {type(cache).__name__}; {USE_ATTENTION}")
    length = int(cache.get_seq_length())
    tokens = attachment.config.num_virtual_tokens if _has_self_sites(attachment) else 0
    identity = internals.held_prefix(cache)
    if identity is None:
        if length:
            raise EngineError(
                f"the cache passed in holds {length} tokens that were read without the prefix; start from an "
                "empty cache, or use the one this model returned"
            )
        return 0
    if identity != attachment.identity:
        raise EngineError("the cache passed in holds another prefix; start from an empty cache")
    if length < tokens:
        raise EngineError(
            f"the cache passed in was reset or cropped to {length} places and has lost its prefix of {tokens}; "
            "start from a new cache"
        )
    return length - tokens


def _check_mask(arguments: dict[str, Any], call: StackCall) -> None:
    mask = arguments.get("attention_mask")
    if mask is not None and call.mask is None:
        raise EngineError(f"the cache engine takes 2-D attention masks only; {USE_ATTENTION}")
    expected = call.past + call.queries
    if call.mask is not None and call.mask.shape[1] != expected:
        raise EngineError(
            f"attention_mask covers {call.mask.shape[1]} tokens, but cache and input hold {expected} real ones; pass "
            "a mask over all of these, and not over the virtual ones"
        )


def _check_padding(stack: Stack, call: StackCall, attachment: Served) -> None:
    """Distances in a native cache count padding: refuse it where distance matters."""
    if call.mask is None or not (call.mask == 0).any():
        return
    if any(site.window for site in attachment.layout.sites):
        raise EngineError(f"the cache engine cannot pad rows under a sliding window; {USE_ATTENTION}")
    counted = isinstance(stack.positions, RelativeBias) and stack.positions.counts_padding
    if counted and (call.mask[:, 0] == 0).any():
        raise EngineError(
            f"the cache engine cannot pad a decoder's rows on the left under relative positions; {USE_ATTENTION}"
        )


def _check_positions(given: torch.Tensor | None, call: StackCall, first: int) -> None:
    """Refuse packed rows, and a count of tokens that is not the cache's."""
    if given is None:
        return
    expected = torch.arange(call.queries, device=given.device) + call.past + first
    if not bool((given == expected).all()):
        raise EngineError(
            "position_ids do not go on where the cache ends, as in packed rows; the cache engine cannot serve that; "
            f"{USE_ATTENTION}"
        )


def _widen_masks(module: nn.Module, arguments: dict[str, Any], call: StackCall, attachment: Served) -> None:
    """Give the masks in ``arguments`` the columns of the prefix, which the cache has."""
    tokens = attachment.config.num_virtual_tokens
    visible = _visible(attachment, "decoder")
    if _has_self_sites(attachment) and (call.mask is not None or visible is not None):
        arguments["attention_mask"] = _widen(_whole(call), tokens, visible)
    if not _has_cross_sites(attachment) or arguments.get("encoder_hidden_states") is None:
        return
    visible = _visible(attachment, "cross")
    # A decoder that takes no such mask sees all of its encoder's states.
    given = arguments.get("encoder_attention_mask") is not None
    if given or internals.takes(module, "encoder_attention_mask"):
        arguments["encoder_attention_mask"] = _wider_encoder_mask(arguments, tokens, visible)
    elif visible is not None:
        raise EngineError(
            f"{type(module).__name__} takes no mask for its encoder's states, which rows with prefixes of their own "
            f"need; {USE_ATTENTION}"
        )


def _visible(attachment: Served, stack: str) -> torch.Tensor | None:
    """Which virtual tokens each row sees, ``(batch, P)``; ``None``: all do. A cache has one length in all layers."""
    lengths = attachment.lengths()
    place = next((site.place for site in attachment.layout.sites if site.stack == stack), None)
    if lengths is None or place is None:
        return None
    tokens = attachment.config.num_virtual_tokens
    return torch.arange(tokens) >= tokens - torch.tensor(lengths[place])[:, None]


def _whole(call: StackCall) -> torch.Tensor:
    """The mask of a call; of one without, that all tokens are real."""
    if call.mask is not None:
        return call.mask
    assert isinstance(call.past, int), "no static cache gets here"
    return torch.ones(call.batch, call.past + call.queries, dtype=torch.long, device=call.device)


def _widen(mask: torch.Tensor, tokens: int, visible: torch.Tensor | None) -> torch.Tensor:
    """``mask (batch, length)`` with the prefix in front: ones, or what is ``visible`` of it."""
    front = mask.new_ones(mask.shape[0], tokens) if visible is None else visible.to(mask)
    return torch.cat([front, mask], dim=1)


def _wider_encoder_mask(arguments: dict[str, Any], tokens: int, visible: torch.Tensor | None) -> torch.Tensor:
    states = arguments["encoder_hidden_states"]
    mask = arguments.get("encoder_attention_mask")
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    if mask.ndim != 2:
        raise EngineError(f"the cache engine takes 2-D encoder masks only; {USE_ATTENTION}")
    return _widen(mask, tokens, visible)
