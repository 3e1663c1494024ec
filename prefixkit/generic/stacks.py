"""From watched attention calls to stacks and sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import Adapter, Site, Stack
from prefixkit.errors import GUIDE, UnsupportedModelError
from prefixkit.generic.inputs import TARGETS, candidates, required
from prefixkit.generic.positions import positions_of
from prefixkit.generic.probes import caches, hands_down
from prefixkit.generic.watching import AttentionCall, Watched, watch
from prefixkit.weightless import weightless

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Any]


def generic_adapter(inputs: Inputs | None = None) -> Adapter:
    """An adapter for any model whose attention is on transformers' attention interface.

    It watches a few forward passes of two or three tokens and learns which modules call the
    attention function, with which keys and values, in which stack, and how positions can be moved.
    :func:`prefixkit.apply` uses it for every model type that no plugin serves.

    Example::

        adapter = prefixkit.generic_adapter({"pixel_values": image})  # a model with inputs of its own kind
        prefixkit.apply(model, num_virtual_tokens=10, adapter=adapter)

    Args:
        inputs: Arguments for ``model.forward``, small ones; by default tokens, an image or a sound,
            as the model names its main input.

    Returns:
        An adapter whose ``stacks`` raises :class:`UnsupportedModelError` for a model that it cannot watch, or
        whose attention it cannot serve, with the reason.
    """
    return Adapter(model_types=(), stacks=lambda model: watched_stacks(model, inputs))


def watched_stacks(model: PreTrainedModel, inputs: Inputs | None = None) -> list[Stack]:
    """The stacks of ``model``, found by watching.

    Raises:
        UnsupportedModelError: If no tiny forward pass succeeds, none of its modules calls the
            attention function, or one calls it with what no prefix can be put in front of.
    """
    if placement.tensor_mesh(model) is not None:  # here are the heads of this process only
        model = weightless(type(model), model.config)
    inputs, watched = _first_run(model, inputs)
    for call in watched.calls:
        _check_call(model, call)
    groups = _groups(model, watched)
    stacks = [_stack(model, base, calls, groups, watched) for base, calls in groups.items()]
    stacks = [_counting_itself(model, inputs, stack, list(groups)) for stack in _number_layers(model, stacks)]
    stacks = [replace(stack, hands_down=hands_down(model, inputs, stack)) for stack in stacks]
    stacks = [replace(stack, positions=positions_of(model, inputs, stack)) for stack in stacks]
    return [
        replace(stack, caches=caches(model, inputs, stack)) if stack.name == "decoder" else stack for stack in stacks
    ]


def _first_run(model: PreTrainedModel, inputs: Inputs | None) -> tuple[Inputs, Watched]:
    """The first inputs with which the model runs, and what was seen."""
    failures: list[str] = []
    more = (attempt for targets in (TARGETS, TARGETS + 3) for attempt in candidates(model, targets))
    for attempt in more if inputs is None else [inputs]:
        try:
            watched = watch(model, attempt)
        except Exception as error:
            if internals.looked_elsewhere(error):
                raise _off_the_interface(model) from error
            failures.append(f"{', '.join(attempt)}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if "decoder_input_ids" in attempt and _cross_looks_like_self(watched):
            failures.append("an encoder with as many states as the decoder has tokens")
            continue
        if not watched.calls:
            raise _off_the_interface(model)
        return attempt, watched
    raise UnsupportedModelError(
        f"could not watch a forward pass of this {type(model).__name__} (forward needs: "
        f"{', '.join(required(model)) or 'nothing'}); tried {'; '.join(failures) or 'nothing'}. Pass "
        f"adapter=prefixkit.generic_adapter(inputs) with inputs that it runs with, or write an adapter: {GUIDE}"
    )


def _off_the_interface(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"no attention of this {type(model).__name__} goes through transformers' attention interface (in "
        f"transformers {internals.VERSION}), so no prefix can be put in front of it from outside; a plugin "
        f"may serve it: {GUIDE}"
    )


def _cross_looks_like_self(watched: Watched) -> bool:
    """Whether an encoder's states are as many as the decoder's tokens, so that the two cannot be told apart."""
    return bool(watched.calls) and not any(map(_crosses, watched.calls))


def _check_call(model: PreTrainedModel, call: AttentionCall) -> None:
    shapes = f"keys {tuple(call.key.shape)}, values {tuple(call.value.shape)}"
    if call.key.ndim != 4 or call.value.ndim != 4 or call.key.shape[:3] != call.value.shape[:3]:
        raise UnsupportedModelError(
            f"{call.path!r} of this {type(model).__name__} calls attention with {shapes}; a prefix needs (batch, "
            f"heads, tokens, dim) with as many heads and tokens in both. Write an adapter: {GUIDE}"
        )


def _groups(model: nn.Module, watched: Watched) -> dict[str, list[AttentionCall]]:
    """The attention calls in order, by the module that runs their layers.

    A module that attends to other keys again within one call of its own (an image in chunks) counts once.
    """
    groups: dict[str, list[AttentionCall]] = {}
    last: dict[str, AttentionCall] = {}
    for call in watched.calls:
        before = last.get(call.path)
        if before is None or before.turn != call.turn or torch.equal(before.key, call.key):
            groups.setdefault(_base(model, call.path, watched), []).append(call)
        last[call.path] = call
    return groups


def _base(model: nn.Module, path: str, watched: Watched) -> str:
    """The module that runs the layers ``path`` stands in: above the outermost list of modules."""
    parts = path.split(".")
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    above = next(
        (i for i in range(len(parts)) if isinstance(model.get_submodule(".".join(parts[: i + 1])), lists)),
        len(parts) - 1,
    )
    while above and not watched.turns.get(".".join(parts[:above])):
        above -= 1
    return ".".join(parts[:above])


def _stack(
    model: PreTrainedModel, base: str, calls: Sequence[AttentionCall], groups: Mapping[str, Any], watched: Watched
) -> Stack:
    others = [other for other in groups if other != base]
    path = _stack_path(model, base, others)
    cached = internals.takes_cache(model.get_submodule(path))
    crosses = len(groups) > 1 and any(map(_crosses, calls))
    decodes = crosses or (cached and any(_is_causal(call.mask) for call in calls))
    sites = tuple(
        Site(
            path=call.path,
            stack="cross" if crosses and _crosses(call) else "decoder" if decodes else "encoder",
            layer=0,
            kv_heads=call.key.shape[1],
            key_dim=call.key.shape[3],
            value_dim=call.value.shape[3],
            window=_window(model.get_submodule(call.path), call),
            turn=turn,
        )
        for call, turn in _first_turns(calls, watched.turns.get(path, 1))
    )
    return Stack(name="decoder" if decodes else "encoder", path=path, positions=None, sites=sites)


def _first_turns(calls: Sequence[AttentionCall], runs: int) -> Iterator[tuple[AttentionCall, int]]:
    """The calls of the stack's first run, each with its number among those of its module.

    A stack that runs again has its prefix again.
    """
    every = Counter(call.path for call in calls)
    turns: Counter[str] = Counter()
    for call in calls:
        if turns[call.path] < max(1, every[call.path] // runs):
            yield call, turns[call.path]
        turns[call.path] += 1


def _stack_path(model: nn.Module, base: str, others: Sequence[str]) -> str:
    """From ``base`` outwards, the first module that takes positions, else tokens; it must run no other stack."""
    chain = [path for path in _outwards(base) if path == base or not any(_contains(path, other) for other in others)]
    for wanted in (("position_ids",), ("input_ids", "inputs_embeds")):
        for path in chain:
            if any(internals.takes(model.get_submodule(path), name) for name in wanted):
                return path
    return base


def _counting_itself(model: PreTrainedModel, inputs: Inputs, stack: Stack, bases: Sequence[str]) -> Stack:
    """The stack, or the module around it that gets the caller's mask and makes the position ids.

    What a module in between counts, ``0, 1, 2, …`` whatever the mask says, must not be taken for the caller's;
    and where it prepares the masks, padding can no longer be told. Ids of several dimensions are of images, and
    stay that module's matter.
    """
    around = [path for path in _outwards(stack.path) if internals.takes(model.get_submodule(path), "position_ids")]
    inside = [path for path in around if sum(_contains(path, base) for base in bases) == 1]
    notes = watch(model, _with_mask(model, inputs), dict.fromkeys(inside, dict)).arguments
    for path in inside:
        ids, mask = (notes.get(path, {}).get(name) for name in ("position_ids", "attention_mask"))
        if ids is not None and ids.ndim > 2:
            break
        if ids is None and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            return replace(stack, path=path)
    return stack


def _with_mask(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The inputs with a mask of their tokens, if the model takes one."""
    ids = inputs.get("input_ids")
    if ids is None or "attention_mask" in inputs or not internals.takes(model, "attention_mask"):
        return inputs
    return {**inputs, "attention_mask": torch.ones_like(ids)}


def _outwards(path: str) -> Iterator[str]:
    """The path and those of the modules around it."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _contains(path: str, inner: str) -> bool:
    return not path or inner == path or inner.startswith(path + ".")


def _crosses(call: AttentionCall) -> bool:
    """Whether it attends to other tokens than those that ask."""
    return call.key.shape[2] != call.query.shape[2]


def _is_causal(mask: Any) -> bool:
    """Whether an eager mask hides all later tokens from the first one (a window to both sides hides some)."""
    return mask is not None and mask.shape[-2] > 1 and bool((mask[..., 0, 1:] < 0).all())


def _window(module: nn.Module, call: AttentionCall) -> int | None:
    window = call.options.get("sliding_window", getattr(module, "sliding_window", None))
    return int(window) if isinstance(window, int) and not isinstance(window, bool) else None


def _number_layers(model: nn.Module, stacks: Sequence[Stack]) -> list[Stack]:
    """Layers by the index that the modules have in the cache, else in the order of their calls."""
    counts: dict[str, int] = {}
    return [replace(stack, sites=tuple(_numbered(model, stack, counts))) for stack in stacks]


def _numbered(model: nn.Module, stack: Stack, counts: dict[str, int]) -> Iterator[Site]:
    for kind in dict.fromkeys(site.stack for site in stack.sites):
        sites = [site for site in stack.sites if site.stack == kind]
        indices = [getattr(model.get_submodule(site.path), "layer_idx", None) for site in sites]
        numbered = {(index, site.turn) for index, site in zip(indices, sites, strict=True)}
        known = kind != "encoder" and all(isinstance(i, int) for i in indices) and len(numbered) == len(sites)
        for site, index in zip(sites, indices, strict=True):
            count = counts.get(kind, 0)
            counts[kind] = count + 1
            yield replace(site, layer=index if known and index is not None else count)
