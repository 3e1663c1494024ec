"""What every format needs of the model, and what it gives: a configuration and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from prefixkit.adapter import Site, Stack
from prefixkit.discovery import installed
from prefixkit.errors import CheckpointError, ConfigError, HeadError, MethodError
from prefixkit.frozen import FROZEN
from prefixkit.head import choose_head, head_parameters
from prefixkit.layout import Layout
from prefixkit.prefix_config import PrefixConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAT, MLP = "p-tuning-v2", "prefix-tuning"
"""The methods that a prefix from elsewhere may have been trained by."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that a prefix from elsewhere is read for.

    Attributes:
        model: A bare model.
        stacks: All its stacks.
        path: The folder, or the file, that is read; for messages.
    """

    model: PreTrainedModel
    stacks: tuple[Stack, ...]
    path: Path

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the order of the flat prefix."""
        return Layout(site for stack in self.stacks for site in stack.sites).sites

    def of_stack(self, name: str) -> tuple[Site, ...]:
        """The sites of one kind of attention, by layer."""
        return tuple(site for site in self.sites if site.stack == name)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has more than one kind of attention."""
        return len({site.stack for site in self.sites}) > 1

    @property
    def main_stack(self) -> str:
        """The kind of attention that a prefix stands in where a format has only one."""
        return "decoder" if self.of_stack("decoder") else self.sites[0].stack

    def damaged(self, what: str) -> CheckpointError:
        """An error about the file, to be raised."""
        return CheckpointError(f"{self.path}: {what}")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A prefix from elsewhere, as a checkpoint of prefixkit would have it.

    Attributes:
        config: Everything but the numbers.
        values: The tensors by name; ``embedding.weight`` is the flat prefix ``(P, width)``.
    """

    config: PrefixConfig
    values: Mapping[str, torch.Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, on the CPU."""
        return dict(self.values)


def found(
    target: Target,
    flat: torch.Tensor,
    *,
    method: str,
    prefix_dropout: object = 0.0,
    head: Mapping[str, torch.Tensor] | None = None,
    **fields: Any,
) -> Found:
    """A flat prefix ``(P, width)`` and a head as a checkpoint.

    Args:
        target: The model it is for.
        flat: The numbers, in the order of the layout.
        method: What they were trained by; behind an MLP they are its result.
        prefix_dropout: What they were trained with.
        head: The head's parameters, by their name in the model.
        **fields: Of the configuration.

    Raises:
        CheckpointError: If the fields have values that no prefix has.
    """
    options = {"prefix_dropout": 0.0 if prefix_dropout is None else prefix_dropout}
    values, names = _head(target, head or {})
    try:
        config = PrefixConfig(
            method=method,
            method_options=installed().method(method).resolve(options),
            folded=method == MLP,
            num_virtual_tokens=len(flat),
            model_type=str(target.model.config.model_type),
            sites=_chosen(target, fields.get("stacks"), fields.get("layers")),
            head=names,
            **fields,
        )
    except (ConfigError, MethodError) as error:
        raise target.damaged(str(error)) from error
    values = {"embedding.weight": flat, **values}
    if config.num_frozen_tokens:
        values[FROZEN] = flat[: config.num_frozen_tokens]
    return Found(config=config, values=values)


def _chosen(target: Target, stacks: Iterable[str] | None, layers: Iterable[int] | None) -> tuple[Site, ...]:
    return tuple(
        site
        for site in target.sites
        if (stacks is None or site.stack in stacks) and (layers is None or site.layer in layers)
    )


def _head(target: Target, given: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The head's tensors as a checkpoint names them, and the fewest names that cover them.

    Of parameters that are tied, one stands for all, as in the model.
    """
    modules: list[str] = []
    for path, module in target.model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)}
        if path and own and own <= given.keys() and not _covered(path, modules):
            modules.append(path)
    names = (*modules, *(name for name in given if not _covered(name, modules)))
    _check_tied(target, given)
    known = head_parameters(target.model, names)
    return {f"head.{name}": given[name] for name in known}, names


def _check_tied(target: Target, given: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that trained apart from others to which this model ties them.

    Raises:
        CheckpointError: If one of a tied group is missing, or another.
    """
    groups: dict[int, list[str]] = {}
    for name, value in target.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    for names in groups.values():
        there = [given[name] for name in names if name in given]
        if there and not (len(there) == len(names) and all(torch.equal(there[0], other) for other in there)):
            apart = ", ".join(name for name in names if name in given)
            raise target.damaged(
                f"{apart} trained apart, and {', '.join(names)} are one in this model; load it into a model with "
                "tie_word_embeddings=False"
            )


def _covered(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def task_head(target: Target, given: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The head of the model's task class from tensors ``given`` by their names in the model; none for a model without.

    Raises:
        CheckpointError: If one is missing.
    """
    names = head_parameters(target.model, choose_head(target.model, "auto", target.stacks))
    for name in names:
        if name not in given:
            raise HeadError(
                f"{target.path}: the head of this {type(target.model).__name__} needs {name!r}, which is not there; "
                "load the prefix into a model with the head that trained with it, or into the body alone"
            )
    return {name: tensor(target, given, name) for name in names}


def check_moves(target: Target, stacks: Iterable[str]) -> None:
    """Refuse a prefix behind which the first real token stands at position P, where positions cannot be moved.

    Raises:
        CheckpointError: If one of ``stacks`` carries it and counts positions in no way that is known.
    """
    fixed = [stack.name for stack in target.stacks if stack.name in stacks and stack.positions is None]
    if fixed:
        raise target.damaged(
            f"its first real token stands behind the prefix, and prefixkit knows no way to move the positions of this "
            f"{type(target.model).__name__}'s {fixed[0]}; train a prefix with positions='none' here"
        )


def tensor(target: Target, tensors: Mapping[str, object], name: str, dims: int | None = None) -> torch.Tensor:
    """A plain tensor of floating-point numbers, as float32.

    Raises:
        CheckpointError: If it is missing, something else, or has not ``dims`` dimensions.
    """
    if name not in tensors:
        raise target.damaged(f"{name!r} is missing")
    value = tensors[name]
    if not is_plain(value):
        raise target.damaged(f"{name!r} is no plain tensor of floating-point numbers")
    if dims is not None and value.ndim != dims:
        raise target.damaged(f"{name!r} is {tuple(value.shape)}; it must have {dims} dimensions")
    return value.detach().float()


def is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a dense tensor of real numbers, with something in it, and here."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.numel() > 0
    )


def refuse_others(target: Target, tensors: Iterable[str], known: Iterable[str]) -> None:
    """Refuse tensors that nobody reads: they would have had a part in the numbers.

    Raises:
        CheckpointError: If there are any.
    """
    more = sorted(set(tensors) - set(known))
    if more:
        shown = ", ".join(map(repr, more[:3])) + (" and more" if len(more) > 3 else "")
        raise target.damaged(f"it holds {shown}, and this prefix needs no such tensor")


def check_width(target: Target, flat: torch.Tensor, sites: Iterable[Site], where: str) -> None:
    """Refuse a part of the prefix ``(P, width)`` that is not as wide as its sites.

    Raises:
        CheckpointError: If it is not.
    """
    sites = tuple(sites)
    width = sum(site.width for site in sites)
    if flat.shape[1] != width:
        raise target.damaged(
            f"{where} has {flat.shape[1]} numbers for each virtual token; this {type(target.model).__name__} needs "
            f"{width}, for keys and values of {len(sites)} attention layers"
        )
