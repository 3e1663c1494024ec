"""AdapterHub's prefix tuning: ``adapter_config.json`` with ``pytorch_adapter.bin`` or ``adapter.safetensors``.

There is one parametrisation for each kind of attention: ``<base>.prefix_tuning.prefix_tunings.<name>.`` and
``self_prefix`` (the only one of a decoder or an encoder alone), ``encoder_prefix`` or ``cross_prefix``. Each has its
own layers only, so ``leave_out`` makes it narrower. Under it stand ``wte.weight`` and ``control_trans.{0,2}``, or
``control_trans`` alone, which is flat: one row of numbers, ``(P, layers × 2, kv_heads, head_dim)``. The file has it all
again for every layer, under ``.pool.``.

K and V join inside the attention and the mask gets columns that everyone sees: real tokens keep their positions, and
the prefix is never out of sight.

This rests on the source of adapters 1.3.0 (``methods/prefix_tuning.py``, ``loading.py``, and where
``PrefixTuningLayer`` is made in ``models/*/mixin_*.py``), and on files that it wrote. Two things of that library are
not repeated here. Under SDPA without padding its causal mask is wrong; and where positions are a relative bias, its
real tokens are P further from one another than the model was trained for, since keys are counted from the first column
of the prefix on and queries are not. No position policy has the latter, so that a warning says that the numbers are
others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.activations import get_activation

from prefixkit.adapter import RelativeBias, Site
from prefixkit.formats import fields, tensor_files
from prefixkit.formats.found import FLAT, MLP, Found, Target, check_width, found, refuse_others, task_head, tensor
from prefixkit.formats.mlp import fold

TENSOR_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
PLACE = re.compile(r"^(?:.*\.)?prefix_tunings\.(?P<name>[^.]+)\.(?P<place>[^.]+)\.(?P<rest>.+)$")
AGAIN = ".pool."


def read(folder: Path, document: Mapping[str, Any], target: Target) -> Found:
    """The prefix in a folder of ``save_adapter``.

    Raises:
        CheckpointError: If it is another adapter, has gates, is damaged, or for another model.
    """
    config = _config(document, target)
    path = tensor_files.first_of(folder, *TENSOR_FILES)
    if path is None:
        raise target.damaged(f"none of {', '.join(TENSOR_FILES)} is there")
    tensors = {name: value for name, value in tensor_files.read(path).items() if AGAIN not in name}
    layers = _layers(config, target)
    by_stack = {stack: where for where, stack in _places(target).items() if where in _places_of(tensors)}
    sites = {
        stack: [site for site in target.of_stack(stack) if layers is None or site.layer in layers] for stack in by_stack
    }
    parts = {stack: _part(target, config, tensors, where, sites[stack]) for stack, where in by_stack.items()}
    if target.main_stack not in parts:
        raise target.damaged("it holds no prefix_tunings with a self_prefix")
    refuse_others(target, tensors, {name for _, names in parts.values() for name in names})
    _warn_of_bias(target, by_stack)
    order = [stack for stack in ("encoder", "decoder", "cross") if stack in parts]
    flats = [parts[stack][0] for stack in order]
    if len({len(flat) for flat in flats}) > 1:
        raise target.damaged(f"its prefixes have {', '.join(str(len(flat)) for flat in flats)} virtual tokens")
    fields.agree(target, config, "prefix_length", len(flats[0]), "the tensors have")
    return found(
        target,
        torch.cat(flats, dim=1),
        method=FLAT if config.get("flat") is True else MLP,
        prefix_dropout=config.get("dropout"),
        head=_head(folder, target),
        positions="none",
        stacks=tuple(order),
        layers=layers,
        base_model_name_or_path=fields.text(document, "model_name"),
    )


def _config(document: Mapping[str, Any], target: Target) -> Mapping[str, Any]:
    """The adapter's own part of the configuration."""
    config = document.get("config")
    kind = config.get("architecture") if isinstance(config, dict) else None
    if kind != "prefix_tuning" or not isinstance(config, dict):
        raise target.damaged(
            f"architecture is {kind!r}, neither of PEFT nor prefix tuning of AdapterHub; prefixkit reads "
            "'prefix_tuning' alone, outside of a union"
        )
    if config.get("use_gating"):
        raise target.damaged("use_gating is true: a gate that looks at the input has no counterpart here")
    stated, real = document.get("model_type"), target.model.config.model_type
    if stated is not None and stated != real:
        raise target.damaged(f"it is for model type {stated!r}; this {type(target.model).__name__} is {real!r}")
    return config


def _layers(config: Mapping[str, Any], target: Target) -> tuple[int, ...] | None:
    """The layers that carry it; ``None``: all."""
    out = config.get("leave_out") or []
    if not isinstance(out, list) or not all(type(layer) is int for layer in out):
        raise target.damaged(f"leave_out is {out!r}; it must be a list of layer numbers")
    if not out:
        return None
    if target.is_encoder_decoder:
        raise target.damaged(
            f"leave_out is {out}; in an encoder-decoder prefixkit leaves the same layers out everywhere"
        )
    return tuple(site.layer for site in target.sites if site.layer not in out)


def _places(target: Target) -> dict[str, str]:
    """Which kind of attention each name means here."""
    places = {"self": target.main_stack, "self_prefix": target.main_stack}
    if target.is_encoder_decoder:
        places |= {"encoder_prefix": "encoder", "cross_prefix": "cross"}
    return {where: stack for where, stack in places.items() if target.of_stack(stack)}


def _places_of(tensors: Mapping[str, object]) -> set[str]:
    return {match["place"] for name in tensors if (match := PLACE.match(name))}


def _part(
    target: Target, config: Mapping[str, Any], tensors: Mapping[str, object], place: str, sites: Sequence[Site]
) -> tuple[torch.Tensor, set[str]]:
    """The flat prefix ``(P, width)`` of one kind of attention, and its tensors' names."""
    matches = filter(None, map(PLACE.match, tensors))
    starts = sorted({match.string[: match.start("rest")] for match in matches if match["place"] == place})
    if len(starts) > 1:
        raise target.damaged(f"it holds more than one {place}: {', '.join(starts)}")
    trans = f"{starts[0]}control_trans"
    if config.get("flat") is True:
        flat, names = _rows(target, tensor(target, tensors, trans, 1), sum(site.width for site in sites)), {trans}
    else:
        activation = _activation(target, config)
        flat, names = fold(target, tensors, embedding=f"{starts[0]}wte.weight", trans=trans, activation=activation)
    check_width(target, flat, sites, place)
    return flat, names


def _rows(target: Target, numbers: torch.Tensor, width: int) -> torch.Tensor:
    if not width or len(numbers) % width:
        raise target.damaged(f"control_trans has {len(numbers)} numbers; {width} make one virtual token of this model")
    return numbers.view(-1, width)


def _activation(target: Target, config: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    name = config.get("non_linearity", "tanh")
    get: Callable[[str], Callable[[torch.Tensor], torch.Tensor]] = get_activation
    try:
        return get(str(name).lower())
    except KeyError as error:
        raise target.damaged(f"non_linearity is {name!r}, which transformers does not have") from error


def _head(folder: Path, target: Target) -> dict[str, torch.Tensor]:
    """The head of a task class, where one was saved beside the prefix."""
    path = tensor_files.first_of(folder, *HEAD_FILES)
    return {} if path is None else task_head(target, tensor_files.read(path))


def _warn_of_bias(target: Target, carrying: Collection[str]) -> None:
    relative = (stack.name for stack in target.stacks if isinstance(stack.positions, RelativeBias))
    moved = [name for name in relative if name in carrying]
    if moved:
        warnings.warn(
            f"{target.path}: in the {' and the '.join(moved)} AdapterHub moves the relative bias of real tokens by "
            "the length of the prefix; here it is the model's own, with positions='none', so that logits differ from "
            "that library's. Train on before use",
            stacklevel=2,
        )
