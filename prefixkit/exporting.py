"""One plain file with a prefix's keys and values, for engines that know nothing of prefixkit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefixkit.adapter import Site, Stack
from prefixkit.checkpoint_files import is_checkpoint, write_tensors
from prefixkit.errors import CheckpointError, ConfigError, EngineError, closest
from prefixkit.layout import KeyValue
from prefixkit.prefix_config import POSITIONS
from prefixkit.prefixes import require
from prefixkit.turning import STILL, Rotation, moving_sites, rotations, times_from, turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

HEADER = "prefixkit_export"
"""The entry of the file's metadata that holds the header."""
FORMAT = 1


def export(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    positions: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the keys and values of every site into one safetensors file.

    The file has two tensors for each site, named by stack and layer: ``decoder.0.key (kv_heads, P, key_dim)``
    and ``decoder.0.value (kv_heads, P, value_dim)``, keys as the attention gets them, after any rotation. Its
    metadata has an entry ``prefixkit_export``, the text of a JSON object that says the rest: see the export
    format in the documentation. A head that trained with the prefix is not part of it; :func:`prefixkit.save`
    keeps that.

    Example::

        prefixkit.export(model, "prefix.safetensors", positions="shift")
        tensors = safetensors.torch.load_file("prefix.safetensors")
        tensors["decoder.0.key"]  # (kv_heads, P, key_dim)

    Args:
        model: A model with a prefix.
        path: The file, which is replaced in one step; its folder is made if there is none.
        positions: ``"shift"`` or ``"none"``: the policy of the file, the prefix's own if left out. The keys of a
            rotary model are turned for the other one, which is exact.
        dtype: Of the tensors; prefixes train in float32.

    Raises:
        AttachmentError: If the model has no prefix.
        CheckpointError: If ``path`` is a folder, or holds a checkpoint of prefixkit.
        ConfigError: If ``positions`` or ``dtype`` is none of the possible values.
        EngineError: If keys and values do not say it all (a gate, an infix, a prefix memory), the keys cannot
            be turned, or the prefix is offloaded.
    """
    attachment = require(model).attachment
    file, own = Path(path), attachment.config.positions
    positions = own if positions is None else positions
    _check(attachment, file, positions, dtype)
    with torch.no_grad():
        flat = attachment.flat_of(model).detach()
    found = _rotations(model, needed=positions != own)
    if positions != own:
        flat = turn(attachment, flat, found or {}, times_from(own))
    pieces = {place: KeyValue(*(part.to(dtype) for part in pair)) for place, pair in attachment.pieces(flat).items()}
    header = {
        **_header(attachment, positions),
        "sites": [_site(site, pieces[site.place], attachment, positions, found) for site in attachment.layout.sites],
    }
    if attachment.writes(model):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, _tensors(attachment, pieces), {HEADER: json.dumps(header)})


def _check(attachment: Attachment, path: Path, positions: str, dtype: torch.dtype) -> None:
    if positions not in POSITIONS:
        raise ConfigError(
            f"positions is {positions!r}{closest(positions, POSITIONS)}; possible: {', '.join(POSITIONS)}"
        )
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype}; keys and values are floating numbers")
    if path.is_dir():
        raise CheckpointError(f"cannot export to {str(path)!r}: it is a folder; name a file")
    if is_checkpoint(path):
        raise CheckpointError(
            f"cannot export to {str(path)!r}: it is a checkpoint, which prefixkit.load could not read any more; name "
            "another place"
        )
    if attachment.beyond_keys_and_values:
        what = attachment.beyond_keys_and_values
        raise EngineError(f"an export holds keys and values only, and this prefix has {what}; use prefixkit.save")
    names = [_name(site) for site in attachment.layout.sites]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EngineError(f"an export names its tensors by stack and layer, and this model has two of {twice}")


def _rotations(model: PreTrainedModel, *, needed: bool) -> dict[str, Rotation] | None:
    """How keys turn, by the site's place; ``None`` where they do not, or it cannot be told."""
    try:
        return rotations(model)
    except EngineError:
        if needed:
            raise
        return None


def _header(attachment: Attachment, positions: str) -> dict[str, Any]:
    config = attachment.config
    starts = {stack.name: _first_of_text(attachment, stack, positions) for stack in attachment.stacks if stack.sites}
    return {
        "format": FORMAT,
        "model_type": config.model_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "num_virtual_tokens": config.num_virtual_tokens,
        "positions": positions,
        "window": config.window,
        "text_starts_at": starts,
    }


def _first_of_text(attachment: Attachment, stack: Stack, positions: str) -> int:
    """The position at which the text of a stack starts; cross-attention alone moves nothing."""
    moves = positions == "shift" and stack.positions is not None and moving_sites(stack)
    return attachment.config.num_virtual_tokens if moves else 0


def _site(
    site: Site, piece: KeyValue, attachment: Attachment, positions: str, found: dict[str, Rotation] | None
) -> dict[str, Any]:
    """What the header says of one site."""
    # The keys of cross-attention stand where an encoder's states do, which have no position.
    rotation = STILL if site.stack == "cross" else (found or {}).get(site.place)
    return {
        "name": _name(site),
        "path": site.path,
        "stack": site.stack,
        "layer": site.layer,
        "tokens": piece.key.shape[1],
        "kv_heads": site.kv_heads,
        "key_dim": site.key_dim,
        "value_dim": site.value_dim,
        "window": site.window,
        "dtype": str(piece.key.dtype).removeprefix("torch."),
        "rotated": None if rotation is None else bool(rotation.style),
        "rotation": _rotation(rotation),
        "first_position": _first_position(attachment, positions, piece) if rotation and rotation.style else None,
    }


def _rotation(rotation: Rotation | None) -> dict[str, Any] | None:
    if rotation is None or not rotation.style:
        return None
    angles = rotation.angles.tolist()
    return {"style": rotation.style, "first_dim": rotation.first, "dims": 2 * len(angles), "angles": angles}


def _first_position(attachment: Attachment, positions: str, piece: KeyValue) -> int:
    """Where the site's first key stands: the prefix's own are 0 to P - 1, and turning moves them with the text."""
    tokens = attachment.config.num_virtual_tokens
    moved = {("none", "shift"): tokens, ("shift", "none"): -tokens}.get((attachment.config.positions, positions), 0)
    return moved + tokens - piece.key.shape[1]


def _tensors(attachment: Attachment, pieces: dict[str, KeyValue]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for site in attachment.layout.sites:
        name, (key, value) = _name(site), pieces[site.place]
        tensors |= {f"{name}.key": key, f"{name}.value": value}
    return tensors


def _name(site: Site) -> str:
    return f"{site.stack}.{site.layer}"
