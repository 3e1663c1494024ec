"""Watch one forward pass: which modules call the attention function, with what, and what is looked up where.

The model is as it was afterwards: configs, training flags, buffers, attributes, random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.as_it_was import as_it_was
from prefixkit.prefix_state import STATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes a module's arguments by name and returns what to call it with."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function.

    Attributes:
        path: The module that called.
        turn: In which call of that module, from 0.
        query: ``(batch, heads, queries, key_dim)``.
        key: ``(batch, kv_heads, keys, key_dim)``.
        value: ``(batch, kv_heads, keys, value_dim)``.
        mask: What the attention function was given.
        options: Its further keyword arguments.
    """

    path: str
    turn: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    options: dict[str, Any]


@dataclass
class Watched:
    """What was seen in one forward pass.

    Attributes:
        calls: The attention calls, in order.
        turns: How often each module was called, by path.
        looked_up: What each embedding table gave last, by path.
        arguments: Arguments of the modules that were asked about, by path.
        outputs: Their outputs.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    turns: dict[str, int] = field(default_factory=dict)
    looked_up: dict[str, torch.Tensor] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


def watch(model: PreTrainedModel, inputs: Mapping[str, Any], changes: Mapping[str, Change] | None = None) -> Watched:
    """What happens in one forward pass without gradients.

    Args:
        model: A bare model, which stays as it is.
        inputs: Arguments of its forward.
        changes: Modules by path whose arguments are changed, and noted.
    """
    watched = Watched()
    paths = {id(module): path for path, module in model.named_modules()}

    def see(module: nn.Module, given: tuple[Any, Any, Any, Any], options: dict[str, Any]) -> None:
        path = paths[id(module)]
        turn = watched.turns.get(path, 1) - 1
        watched.calls.append(AttentionCall(path, turn, *given, dict(options)))
        options.pop(STATE, None)  # a probe, not for the attention function

    with as_it_was(model), _hooks(model, watched, changes or {}), internals.attention_seen_by(model, see):
        model(**inputs)
    return watched


@contextmanager
def _hooks(model: nn.Module, watched: Watched, changes: Mapping[str, Change]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(_counter(watched, path)))
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_hook(_table(watched, path)))
            if path in changes:
                change = _changer(watched, path, changes[path])
                handles.append(module.register_forward_pre_hook(change, with_kwargs=True))
                handles.append(module.register_forward_hook(_noter(watched, path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counter(watched: Watched, path: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        watched.turns[path] = watched.turns.get(path, 0) + 1

    return count


def _table(watched: Watched, path: str) -> Callable[..., None]:
    def note(*called: Any) -> None:
        watched.looked_up[path] = called[-1]

    return note


def _changer(watched: Watched, path: str, change: Change) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs}
        watched.arguments[path] = arguments
        return (), change(dict(arguments))

    return before


def _noter(watched: Watched, path: str) -> Callable[..., None]:
    def after(*called: Any) -> None:
        watched.outputs[path] = called[-1]

    return after
