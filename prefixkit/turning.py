"""From one position policy to the other: keys are turned, where positions enter as a rotation of them (RoPE).

Under ``none`` the text stands at 0, 1, 2, … and under ``shift`` at P, P + 1, P + 2, …. A rotary model sees
distances only, so a prefix that is turned by P goes with the text, and every number stays what it was.

How a model rotates is not read off its name or its config. Its tables of frequencies make candidates, and a
token that the base reads at position 0 and at position P tells which of them is the one, site by site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import PositionIds, Site, Stack
from prefixkit.as_it_was import as_it_was
from prefixkit.errors import EngineError, PrefixkitError
from prefixkit.initialisation import random_ids
from prefixkit.layout import KeyValue
from prefixkit.lifecycle import disabled
from prefixkit.prefixes import require
from prefixkit.reading import of_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

PROBES = 2
"""Tokens that are read at both positions; each has a key for every head, and one would do."""
CLOSE = 1e-4
"""Relative error up to which a turned key passes for the one that the base makes; in a dtype with coarser
numbers :data:`ROUNDINGS` of its steps."""
ROUNDINGS = 8

Keys = dict[str, torch.Tensor]
"""Keys ``(kv_heads, tokens, key_dim)`` by the site's place, as its attention gets them."""


@dataclass(frozen=True)
class Rotation:
    """How moving a token by P positions turns its key: some pairs of its numbers, each by an angle.

    Attributes:
        style: ``"half"`` (a number and the one half of the turned numbers further on), ``"interleaved"`` (a
            number and the next one), or ``""``: nothing turns.
        first: The first number of a head's key that turns.
        angles: For P positions, in radians, ``(pairs,)``, float64.
    """

    style: str
    first: int
    angles: torch.Tensor

    def turn(self, key: torch.Tensor, times: int = 1) -> torch.Tensor:
        """``key (kv_heads, tokens, key_dim)`` moved by ``times`` P positions, in its dtype, on its device."""
        pairs, before = len(self.angles), key.cpu().double()  # float64 is not on every device
        step, apart = (1, pairs) if self.style == "half" else (2, 1)
        one = self.first + step * torch.arange(pairs)
        cos, sin = (times * self.angles).cos(), (times * self.angles).sin()
        x, y = before[..., one], before[..., one + apart]
        after = before.clone()
        after[..., one], after[..., one + apart] = x * cos - y * sin, y * cos + x * sin
        return after.to(key)


STILL = Rotation("", 0, torch.zeros(0, dtype=torch.float64))
"""Of a site whose keys know no position."""


def turned(model: PreTrainedModel, positions: str) -> torch.Tensor:
    """The flat prefix ``(P, width)`` that gives under ``positions`` what the model's prefix gives under its own policy.

    Example::

        flat = turned(model, "shift")  # of a prefix with positions="none"
        prefixkit.apply(prefixkit.remove(model), num_virtual_tokens=len(flat), positions="shift", init=flat)

    Args:
        model: A model with a prefix.
        positions: ``"shift"`` or ``"none"``.

    Returns:
        The flat prefix, detached; as it is, if that is its policy already.

    Raises:
        AttachmentError: If the model has no prefix.
        EngineError: If the keys cannot be turned.
    """
    attachment = require(model).attachment
    with torch.no_grad():
        flat = attachment.flat_of(model).detach()
        own = attachment.config.positions
        if own == positions:
            return flat
        return turn(attachment, flat, rotations(model), times_from(own))


def times_from(positions: str) -> int:
    """How many times P positions lead from this policy to the other."""
    return 1 if positions == "none" else -1


def turn(attachment: Attachment, flat: torch.Tensor, rotations: Mapping[str, Rotation], times: int) -> torch.Tensor:
    """The flat prefix with its keys moved ``times`` as far as the rotations of its sites say."""
    sites = zip(attachment.layout.sites, attachment.layout.split(flat), strict=True)
    return attachment.layout.join(
        [KeyValue(rotations.get(site.place, STILL).turn(piece.key, times), piece.value) for site, piece in sites]
    )


def rotations(
    model: PreTrainedModel, attachment: Attachment | None = None, tokens: int | None = None
) -> dict[str, Rotation]:
    """How ``tokens`` positions turn the keys of every site that moves with the text, by its place.

    Args:
        model: A model with a prefix.
        attachment: Whose sites; the active one's by default.
        tokens: How many positions; the length of its prefix by default.

    Raises:
        EngineError: If positions enter in another way than by a rotation, or it cannot be told.
    """
    attachment = attachment or require(model).attachment
    tokens = tokens or attachment.config.num_virtual_tokens
    stacks = _moved_stacks(attachment)
    sites = [site for stack in stacks for site in moving_sites(stack)]
    if not sites:
        return {}
    before, after, tables = _probe(model, attachment, stacks, tokens)
    return {site.place: _rotation_of(site, before, after, tables) for site in sites}


def moving_sites(stack: Stack) -> list[Site]:
    """The sites whose keys stand where the stack's own tokens do."""
    return [site for site in stack.sites if site.stack == stack.name]


def _moved_stacks(attachment: Attachment) -> list[Stack]:
    """Those that a position policy moves; where positions cannot be moved, one policy is like the other.

    Raises:
        EngineError: If there is none, though a prefix stands in a stack's own attention, or one has no rotation.
    """
    carrying = [stack for stack in attachment.stacks if moving_sites(stack)]
    moved = [stack for stack in carrying if stack.positions is not None]
    if carrying and not moved:
        raise _cannot(f"positions of the stack {carrying[0].path!r} cannot be moved from outside")
    for stack in moved:
        _check_rotary(stack)
    return moved


def _check_rotary(stack: Stack) -> None:
    kind = stack.positions
    if not isinstance(kind, PositionIds):
        raise _cannot(f"its positions are no rotation of keys but a {type(kind).__name__} ({stack.path!r})")
    if kind.prefix_bias is not None:
        raise _cannot(f"its positions are a bias on the scores as well ({stack.path!r})")


def _cannot(reason: str) -> EngineError:
    return EngineError(f"this model's keys cannot be turned: {reason}; apply the prefix under the policy you need")


def _probe(
    model: PreTrainedModel, attachment: Attachment, stacks: list[Stack], tokens: int
) -> tuple[Keys, Keys, list[torch.Tensor]]:
    """Keys of the same tokens at position 0 and at ``tokens``, and the angles of so many positions in its tables.

    Each token is read alone: it attends to itself only, so that nothing but a rotation can tell the two apart.
    """
    try:
        with disabled(model), as_it_was(model):
            texts = [_text(model) for _ in range(PROBES)]
            before, after = (_keys_of_all(model, attachment, stacks, texts, place) for place in (0, tokens))
            return before, after, list(_angles(model, tokens))
    except PrefixkitError as error:
        raise _cannot(str(error)) from error
    except Exception as error:
        raise _cannot(f"it does not read a token at position {tokens}: {type(error).__name__}: {error}") from error


def _text(model: PreTrainedModel) -> dict[str, Any]:
    ids = random_ids(model, 1)[None].to(placement.real_device(model))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def _keys_of_all(
    model: PreTrainedModel, attachment: Attachment, stacks: list[Stack], texts: list[dict[str, Any]], place: int
) -> Keys:
    modules = [model.get_submodule(site.path) for stack in stacks for site in moving_sites(stack)]
    read = _through_attention if all(map(internals.is_on_interface, modules)) else _through_cache
    with _standing_at(model, stacks, place):
        read_keys = [read(model, attachment, text) for text in texts]
    return {name: torch.cat([keys[name] for keys in read_keys], dim=1).cpu() for name in read_keys[0]}


@contextmanager
def _standing_at(model: PreTrainedModel, stacks: list[Stack], place: int) -> Iterator[None]:
    """Inside, the one token that a stack gets stands at position ``place``."""
    handles = []
    try:
        for stack in stacks:
            assert isinstance(stack.positions, PositionIds)
            mover = _mover(place + stack.positions.offset, model)
            handles.append(model.get_submodule(stack.path).register_forward_pre_hook(mover, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mover(position: int, model: PreTrainedModel) -> Any:
    ids = torch.tensor([[position]], device=placement.real_device(model))

    def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(internals.parameter_names(type(module)), args, strict=False))
        return (), {**named, **kwargs, "position_ids": ids}

    return move


def _through_attention(model: PreTrainedModel, attachment: Attachment, inputs: Mapping[str, Any]) -> Keys:
    """What the attention function gets, by the site's place."""
    keys: Keys = {}
    places = {id(model.get_submodule(site.path)): site.path for site in attachment.layout.sites}
    turns: dict[str, int] = {}
    named = {(site.path, site.turn): site.place for site in attachment.layout.sites}

    def see(module: nn.Module, given: tuple[Any, Any, Any, Any], _: dict[str, Any]) -> None:
        path = places.get(id(module), "")
        turns[path] = turns.get(path, -1) + 1
        if (path, turns[path]) in named:
            keys[named[path, turns[path]]] = given[1][0]

    with internals.attention_seen_by(model, see):
        model.base_model(**inputs)
    return keys


def _through_cache(model: PreTrainedModel, attachment: Attachment, inputs: Mapping[str, Any]) -> Keys:
    """What the native cache keeps, where no attention function is called."""
    cache = internals.cache_in(model.base_model(**inputs, use_cache=True))
    if cache is None:
        raise EngineError(f"{type(model).__name__} returns no cache that its keys could be read from")
    return {place: piece.key for place, piece in of_cache(cache, attachment).items()}


def _angles(model: nn.Module, tokens: int) -> Iterator[torch.Tensor]:
    """By how much ``tokens`` positions may turn a key, ``(pairs,)`` each: all that tables in the model may say.

    A vector may hold an angle per position, and a matrix a row of sines and cosines for each position.
    """
    seen = set()
    for table in _tables(model):
        if table.is_meta:
            continue
        angles = None
        if table.ndim == 1:
            angles = tokens * table.cpu().double()
        elif table.shape[0] > tokens and table.shape[1] % 2 == 0:
            sin, cos = table[tokens].cpu().double().chunk(2)
            angles = torch.atan2(sin, cos)
        if angles is not None and (name := tuple(angles.tolist())) not in seen:
            seen.add(name)
            yield angles


def _tables(model: nn.Module) -> Iterator[torch.Tensor]:
    """Vectors and matrices that the modules keep beside their weights."""
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor) and value.ndim in {1, 2} and value.is_floating_point():
                yield value


def _candidates(site: Site, tables: list[torch.Tensor]) -> Iterator[Rotation]:
    """Nothing turns; or pairs at the beginning of a head's key do, or at its end, as one of the tables says.

    Either way round, which is a matter of taste as long as queries turn with keys.
    """
    yield STILL
    for angles in tables:
        rest = site.key_dim - 2 * len(angles)
        if rest >= 0:
            for style, first, sign in product(("half", "interleaved"), sorted({0, rest}), (1, -1)):
                yield Rotation(style, first, sign * angles)


def _rotation_of(site: Site, before: Keys, after: Keys, tables: list[torch.Tensor]) -> Rotation:
    if site.place not in before or site.place not in after:
        raise _cannot(f"no key of {site.path!r} was seen")
    start, end = before[site.place].double(), after[site.place].double()
    tried = [(_error(one.turn(start), end), one) for one in _candidates(site, tables)]
    error, best = min(tried, key=lambda pair: pair[0])
    if not error <= max(CLOSE, ROUNDINGS * torch.finfo(after[site.place].dtype).eps):
        raise _cannot(
            f"of the {len(tried)} rotations that the tables in the model allow, none turns the key that {site.path!r} "
            f"makes at position 0 into that of the same token behind the prefix; the closest is off by {error:.0%}"
        )
    return best


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest distance of a head's key from what is wanted, relative to its length."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)).max())
