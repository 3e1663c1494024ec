"""One prefix made of several: one behind the other, or their average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from prefixkit.adapter import RelativeBias
from prefixkit.attachment import Attachment
from prefixkit.discovery import installed
from prefixkit.errors import ConfigError
from prefixkit.lifecycle import changing
from prefixkit.method import EMBEDDINGS
from prefixkit.prefix_encoder import flat_encoder
from prefixkit.prefixes import require
from prefixkit.turning import rotations, turn

Model = TypeVar("Model", bound=PreTrainedModel)

KEPT, CONSECUTIVE, ALIGNED = "kept", "consecutive", "aligned"
PLACES = (KEPT, CONSECUTIVE, ALIGNED)
FLAT = "p-tuning-v2"


def average(model: Model, weights: Mapping[str, float], name: str = "average") -> Model:
    """A new prefix whose keys and values are the weighted sum of others', and the active one from now on.

    Example::

        prefixkit.average(model, {"summaries": 0.7, "dialogue": 0.3}, name="both")

    An MLP is folded first, so what is averaged is what the attention sees; heads are averaged with it. The others
    stay on the model as they are.

    Args:
        model: A model with the prefixes.
        weights: By name how much of each; they are taken as they are, and need not sum to 1.
        name: What to call the new one.

    Raises:
        AttachmentError: If the model has none of such a name, or one that is called ``name``.
        ConfigError: If they differ in length, sites, policies or head, or are no plain keys and values.
    """
    parts = _parts(model, list(weights))
    first = parts[0]
    _check_alike(parts, ("num_virtual_tokens", "layer_tokens", "head"))
    with torch.no_grad():
        flat = _sum([one.flat_of(model).detach() for one in parts], weights.values())
        heads = [one.head_values(model) for one in parts]
        head = {key: _sum([each[key] for each in heads], weights.values()) for key in heads[0]}
    return _add(model, first, name, flat, head)


def _sum(values: Sequence[torch.Tensor], weights: Iterable[float]) -> torch.Tensor:
    return torch.stack([weight * value for value, weight in zip(values, weights, strict=True)]).sum(0)


def compose(model: Model, names: Sequence[str], name: str = "composed", *, places: str | None = None) -> Model:
    """A new prefix of all virtual tokens of others, in their order, and the active one from now on.

    Example::

        prefixkit.compose(model, ["company", "summaries"], name="both", places="consecutive")

    The others stay on the model as they are.

    Args:
        model: A model with the prefixes.
        names: Which, the first one in front.
        name: What to call the new one.
        places: Where their keys stand before the text, which has to be said under ``positions="shift"``.
            ``"consecutive"``: one behind the other, as two texts would; rotated keys of the later ones are turned
            by the lengths of the earlier. ``"aligned"``: each right before the text, at the distance that it was
            trained at; rotated keys of the shorter ones are turned. ``"kept"``: every key stays as it is. Where
            positions enter by embeddings they are in the keys for good, which is ``"kept"``; a bias on distances
            goes by order, which is ``"consecutive"``.

    Raises:
        AttachmentError: If the model has none of such a name, or one that is called ``name``.
        ConfigError: If ``places`` cannot be had, they differ in sites or policies, are no plain keys and values, have
            layers of other lengths, or more than one head.
        EngineError: If the model's keys cannot be turned.
    """
    parts = _parts(model, list(names))
    _check_places(parts, places)
    for one in parts:
        if one.config.layer_tokens:
            raise ConfigError(f"prefix {one.config.name!r} has layers of other lengths, and cannot be composed")
    owners = [one for one in parts if one.config.head]
    if len(owners) > 1:
        with_head = ", ".join(repr(one.config.name) for one in owners)
        raise ConfigError(f"{with_head} have heads of their own, and one prefix has one; compose with one of them")
    lengths = [one.config.num_virtual_tokens for one in parts]
    moves = [_move(lengths, index, places) for index in range(len(parts))]
    with torch.no_grad():
        flats = [_moved(model, one, move) for one, move in zip(parts, moves, strict=True)]
        owner = owners[0] if owners else parts[0]
        return _add(model, owner, name, torch.cat(flats), owner.head_values(model))


def _parts(model: PreTrainedModel, names: list[str]) -> list[Attachment]:
    prefixes = require(model)
    parts = [prefixes.named(one) for one in names]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(f"{names} are not two prefixes or more, each once")
    for one in parts:
        if one.beyond_keys_and_values:
            what = one.beyond_keys_and_values
            raise ConfigError(f"prefix {one.config.name!r} has {what}; only plain keys and values can be combined")
        if one.gives == EMBEDDINGS:  # what the base makes of them may depend on the head that is in it
            raise ConfigError(f"prefix {one.config.name!r} has no keys and values yet; activate and fold it first")
    _check_alike(parts, ("sites", "positions", "window"))
    return parts


def _check_alike(parts: list[Attachment], fields: Iterable[str]) -> None:
    for field in fields:
        found = [getattr(one.config, field) for one in parts]
        odd = next((index for index, value in enumerate(found) if value != found[0]), None)
        if odd is not None:
            one, other = (parts[index].config.name for index in (odd, 0))
            raise ConfigError(f"{field} of prefix {one!r} is not that of {other!r}: {found[odd]!r}, and {found[0]!r}")


def _check_places(parts: list[Attachment], places: str | None) -> None:
    if places is not None and places not in PLACES:
        raise ConfigError(f"places is {places!r}; possible: {', '.join(PLACES)}")
    shifts = any(one.shifts(stack) for one in parts for stack in one.stacks)
    if not shifts:
        if places in (CONSECUTIVE, ALIGNED):
            raise ConfigError(
                f"under positions='none' keys stand at no place before the text, so places={places!r} means nothing; "
                "leave it out"
            )
        return
    biased = any(isinstance(stack.positions, RelativeBias) for stack in parts[0].stacks if stack.sites)
    possible = (CONSECUTIVE,) if biased else PLACES
    if places not in possible:
        raise ConfigError(
            f"under positions='shift' it has to be said where the keys stand, and places is {places!r}; possible "
            f"here: {', '.join(possible)}"
        )


def _move(lengths: list[int], index: int, places: str | None) -> int:
    """By how many positions the keys of one part move."""
    if places == CONSECUTIVE:
        return sum(lengths[:index])
    return sum(lengths) - lengths[index] if places == ALIGNED else 0


def _moved(model: PreTrainedModel, part: Attachment, move: int) -> torch.Tensor:
    """The flat prefix of ``part`` with its keys so many positions further on."""
    flat = part.flat_of(model).detach()
    biased = any(isinstance(stack.positions, RelativeBias) for stack in part.stacks if stack.sites)
    return flat if biased or not move else turn(part, flat, rotations(model, part, move), 1)


def _add(model: Model, like: Attachment, name: str, flat: torch.Tensor, head: Mapping[str, torch.Tensor]) -> Model:
    """A flat prefix with the sites, policies and engine of another, and its head's values."""
    config = replace(
        like.config,
        name=name,
        method=FLAT,
        method_options=installed().method(FLAT).resolve({}),
        num_virtual_tokens=len(flat),
        num_frozen_tokens=0,
        folded=False,
    )
    new = Attachment(
        config=config, stacks=like.stacks, layout=like.layout, encoder=flat_encoder(flat), engine=like.engine
    )
    new.kept_head = {key: value.detach().clone() for key, value in head.items()}
    with changing(model) as prefixes:
        prefixes.add(new)
    return model
