"""What a stack does with what it is given, tried out: an unknown keyword argument, a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefixkit import transformers_internals as internals
from prefixkit.adapter import Stack
from prefixkit.generic.watching import Watched, watch
from prefixkit.prefix_state import STATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hands_down(model: PreTrainedModel, inputs: Mapping[str, Any], stack: Stack) -> bool:
    """Whether a keyword argument that the stack does not know arrives at all of its attention."""
    if not internals.takes_any_keyword(model.get_submodule(stack.path)):
        return False
    try:
        watched = watch(model, inputs, {stack.path: lambda arguments: {**arguments, STATE: "a probe"}})
    except Exception:  # noqa: BLE001 - some module on the way takes no such argument
        return False
    here = {site.path for site in stack.sites}
    return all(STATE in call.options for call in watched.calls if call.path in here)


def caches(model: PreTrainedModel, inputs: Mapping[str, Any], stack: Stack) -> bool:
    """Whether the native cache keeps, layer by layer, what the attention is given, and nothing else."""
    module = model.get_submodule(stack.path)
    if not internals.takes_cache(module) or not internals.takes(module, "use_cache"):
        return False
    try:
        watched = watch(model, inputs, {stack.path: lambda arguments: {**arguments, "use_cache": True}})
    except Exception:  # noqa: BLE001 - whatever a model may raise
        return False
    return _keeps(watched, stack)


def _keeps(watched: Watched, stack: Stack) -> bool:
    cache = internals.cache_in(watched.outputs.get(stack.path))
    if cache is None:
        return False
    calls = {call.path: call for call in watched.calls}
    if any(_chooses_keys(calls[site.path].mask) for site in stack.sites):
        return False
    own, cross = internals.self_and_cross(cache)
    own_sites = {site.layer: site for site in stack.sites if site.stack == "decoder"}
    if set(own_sites) != set(range(len(own.layers))):
        return False  # other layers keep a state of another kind
    if any(internals.layer_slides(layer) and own_sites[i].window is None for i, layer in enumerate(own.layers)):
        return False  # chunks, or a window that only the mask knows of
    layers = {"decoder": own.layers, "cross": cross.layers if cross is not None else []}
    return all(
        site.layer < len(layers[site.stack])
        and internals.layer_holds(layers[site.stack][site.layer], calls[site.path].key, calls[site.path].value)
        for site in stack.sites
    )


def _chooses_keys(mask: Any) -> bool:
    """Whether every head has a mask of its own, made from the keys: a prefix in the cache would take part in it."""
    return mask is not None and mask.shape[1] > 1
