"""Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): a ``.pt`` file of keys and values for every layer.

``trainable_keys`` and ``trainable_values``, and of the first tokens, which do not train, ``frozen_keys`` and
``frozen_values`` (``fixed_keys`` and ``fixed_values`` in older files): lists, or ``ParameterList``, of
``(1, kv_heads, tokens, head_dim)``. Newer files also have ``segment_keys``, ``segment_values`` and ``segment_info``,
``(start, end, is_frozen)`` for each run of tokens, and the former then are the same numbers.

Keys are stored rotated, the first real token stands at position P, and every token sees all of the cartridge.

This rests on ``TrainableCache.save`` and ``from_pretrained`` in ``cartridges/cache.py`` of HazyResearch/cartridges, as
found in public copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prefixkit.adapter import Site
from prefixkit.formats.found import FLAT, Found, Target, check_moves, found, is_plain, refuse_others
from prefixkit.layout import KeyValue, Layout

TRAINABLE = ("trainable_keys", "trainable_values")
FROZEN = (("frozen_keys", "frozen_values"), ("fixed_keys", "fixed_values"))
SEGMENTS = ("segment_keys", "segment_values", "segment_info", "freeze_ranges")
Run = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Keys and values of some tokens, by layer."""


def is_here(content: Mapping[str, object]) -> bool:
    """Whether the content of a file is a cartridge."""
    return TRAINABLE[0] in content


def read(content: Mapping[str, object], target: Target) -> Found:
    """The prefix in ``content``.

    Raises:
        CheckpointError: If it is damaged, for another model, or has frozen tokens behind others.
    """
    refuse_others(target, content, {*TRAINABLE, *(name for names in FROZEN for name in names), *SEGMENTS})
    if target.is_encoder_decoder or target.main_stack != "decoder":
        raise target.damaged(f"a cartridge is for a decoder alone; this {type(target.model).__name__} is none")
    check_moves(target, ["decoder"])
    info = content.get("segment_info")
    runs = _plain_runs(content, target) if info is None else _segments(content, info, target)
    frozen = [tokens for tokens, is_frozen in ((run[0][0].shape[2], stays) for run, stays in runs) if is_frozen]
    if any(is_frozen for _, is_frozen in runs[1:]):
        raise target.damaged("some of its frozen tokens stand behind others that train; here only the first can stay")
    keys, values = (
        [torch.cat([run[half][layer] for run, _ in runs], dim=2)[0] for layer in range(len(target.sites))]
        for half in (0, 1)
    )
    flat = Layout(target.sites).join([KeyValue(*pair) for pair in zip(keys, values, strict=True)])
    if sum(frozen) >= len(flat):
        raise target.damaged(f"all of its {len(flat)} tokens are frozen, so that nothing would train")
    return found(target, flat, method=FLAT, positions="shift", num_frozen_tokens=sum(frozen))


def _plain_runs(content: Mapping[str, object], target: Target) -> list[tuple[Run, bool]]:
    """The frozen tokens, if there are any, and those that train."""
    runs = [(_run(content, TRAINABLE, target), False)]
    names = next((names for names in FROZEN if names[0] in content), None)
    if names is not None and _items(content.get(names[0]), target, names[0]):
        runs.insert(0, (_run(content, names, target), True))
    return runs


def _segments(content: Mapping[str, object], info: object, target: Target) -> list[tuple[Run, bool]]:
    """Runs of tokens in their order, and whether each is frozen."""
    if not isinstance(info, list) or not info or not all(isinstance(part, tuple) and len(part) == 3 for part in info):
        raise target.damaged(f"segment_info is {info!r}; expected (start, end, is_frozen) for each segment")
    halves = [dict(enumerate(_items(content.get(name), target, name))) for name in SEGMENTS[:2]]
    runs: list[tuple[Run, bool]] = []
    for index, (_, _, is_frozen) in enumerate(info):
        named = {name: half.get(index) for name, half in zip(SEGMENTS[:2], halves, strict=True)}
        runs.append((_run(named, SEGMENTS[:2], target), is_frozen is True))
    return runs


def _run(content: Mapping[str, object], names: Sequence[str], target: Target) -> Run:
    """Keys and values by layer, each checked against its site."""
    keys, values = (_items(content.get(name), target, name) for name in names)
    if not len(keys) == len(values) == len(target.sites):
        raise target.damaged(
            f"{names[0]} and {names[1]} are of {len(keys)} and {len(values)} layers; this "
            f"{type(target.model).__name__} has {len(target.sites)}"
        )
    checked: Run = ([], [])
    for site, key, value in zip(target.sites, keys, values, strict=True):
        tokens = keys[0].shape[2] if is_plain(keys[0]) and keys[0].ndim == 4 else 0
        checked[0].append(_checked(key, (1, site.kv_heads, tokens, site.key_dim), site, names[0], target))
        checked[1].append(_checked(value, (1, site.kv_heads, tokens, site.value_dim), site, names[1], target))
    return checked


def _checked(part: object, shape: tuple[int, ...], site: Site, name: str, target: Target) -> torch.Tensor:
    if not is_plain(part) or tuple(part.shape) != shape:
        what = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
        raise target.damaged(f"{name} of layer {site.layer} is {what}; {site.path!r} needs floating-point {shape}")
    return part.detach().float()


def _items(holder: object, target: Target, name: str) -> list[object]:
    """What a list, or a ``ParameterList`` out of a file, holds; none of its methods is called."""
    if isinstance(holder, list | tuple):
        return list(holder)
    if not isinstance(holder, torch.nn.ParameterList):
        raise target.damaged(f"{name} is {type(holder).__name__}; expected a list of tensors")
    inside = vars(holder)
    named: dict[str, object] = {}
    for kept in (inside, inside.get("_modules"), inside.get("_parameters")):
        if isinstance(kept, dict):
            named |= {key: value for key, value in kept.items() if isinstance(key, str)}
    places = sorted(int(key) for key in named if key.isdecimal())
    return [named[str(place)] for place in places]
