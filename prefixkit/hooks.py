"""The hooks that carry a prefix into every call of a model."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import gradient_check, transformers_internals as internals
from prefixkit.adapter import PositionTable, Stack
from prefixkit.attention_engine import AttentionEngine
from prefixkit.cache_engine import CacheEngine
from prefixkit.continuous_batching import check_paged
from prefixkit.errors import UnsupportedModelError
from prefixkit.infix import AfterLabels, BeforeLabels
from prefixkit.kept import once
from prefixkit.placement import is_partitioned
from prefixkit.positions import count_positions, forget_positions, look_up_placed
from prefixkit.prefix_state import state_in, take_away
from prefixkit.tensor_parallel import refuse_spread_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.prefixes import Prefixes

FLAT = "prefix_flat"
"""The keyword under which a model with two stacks hands them the flat prefix, computed once."""


class BeforeModel:
    """Forward pre-hook of the model: computes the flat prefix once for all its stacks."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.prefixes = prefixes

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the flat prefix to the keyword arguments."""
        # ZeRO-3 takes the parameters away again before the stacks run: each has to ask for them.
        encoders = (one.encoder for one in self.prefixes.attachments.values())
        if not self.prefixes.enabled or any(is_partitioned(value) for one in encoders for value in one.parameters()):
            return None
        kept = self.prefixes.kept(internals.cache_among(kwargs))
        return args, {**kwargs, FLAT: once(kept, FLAT, self.prefixes.flat)}


class BeforeStack:
    """Forward pre-hook of a stack: gives every argument its name and lets the engine act on them."""

    def __init__(self, prefixes: Prefixes, stack: Stack, names: tuple[str, ...]) -> None:
        self.prefixes = prefixes
        self.stack = stack
        self.names = names
        self.cache: str = internals.cache_name(names) or internals.CACHE

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with the prefix, or as they were if it is disabled."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        check_paged(self.prefixes, named)
        arguments = _renamed(named, self.cache, internals.CACHE)
        return (), _renamed(self._served(module, arguments), internals.CACHE, self.cache)

    def _served(self, module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same of arguments whose cache has the one name that the engines know."""
        handed = arguments.pop(FLAT, None)
        watched = self.prefixes.check.sees(self.stack.path, module)
        forget_positions()
        active = self.prefixes.attachment
        reading = self.prefixes.reading()
        if reading is not None:
            return AttentionEngine.send(module, self.stack, arguments, active, reading)
        if not self.prefixes.enabled:
            return active.engine.off(module, self.stack, arguments, active)
        kept = self.prefixes.kept(arguments.get(internals.CACHE))
        served = self.prefixes.served(arguments, kept)
        stack = served.at(self.stack.path)
        if not stack.sites:
            count_positions(module, stack, arguments)
            return active.engine.off(module, stack, arguments, active)
        flat = once(kept, FLAT, lambda: served.flat(module) if handed is None else handed)
        arguments = active.engine.before(module, stack, arguments, served, flat, kept=kept)
        if watched:
            key = active.state_key(stack)
            gradient_check.begin(self.prefixes.check, key, served, state_in(arguments, key), module)
        return arguments


def _renamed(arguments: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The arguments with another name for the one called ``old``, if it is there."""
    if old == new or old not in arguments:
        return arguments
    return {**{name: value for name, value in arguments.items() if name != old}, new: arguments[old]}


class AfterStack:
    """Forward hook of a stack: lets the engine act on the output."""

    def __init__(self, prefixes: Prefixes, stack: Stack) -> None:
        self.prefixes = prefixes
        self.stack = stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, as the caller would see it without a prefix."""
        if not self.prefixes.enabled or self.prefixes.reading() is not None:
            return output
        active = self.prefixes.attachment
        output = active.engine.after(module, self.stack, kwargs, active, output)
        if not torch.compiler.is_compiling():
            gradient_check.end(active.state_key(self.stack), module, output)
        return output


class LeaveStack:
    """Forward hook of a stack, also where its forward fails: nothing of the call stays behind."""

    def __init__(self, key: str, *, beside: bool) -> None:
        self.key = key
        self.beside = beside

    def __call__(self, *_: Any) -> None:
        """Take away what travelled beside the call."""
        if self.beside:
            take_away(self.key)
        if not torch.compiler.is_compiling():
            gradient_check.forget(self.key)


def add_hooks(model: PreTrainedModel, prefixes: Prefixes) -> None:
    """Hook the model and its stacks; :attr:`Prefixes.handles` takes the hooks off again."""
    handles, stacks = prefixes.handles, prefixes.stacks
    handed = internals.takes_any_keyword(model) and all(stack.hands_down for stack in stacks)
    if any(one.config.infix for one in prefixes.attachments.values()):
        labels = BeforeLabels(prefixes, tuple(signature(model.forward).parameters))
        handles.append(model.register_forward_pre_hook(labels, with_kwargs=True))
        handles.append(model.register_forward_hook(AfterLabels(prefixes), always_call=True))
    if sum(bool(stack.sites) for stack in stacks) > 1 and handed:
        handles.append(model.register_forward_pre_hook(BeforeModel(prefixes), with_kwargs=True))
    handles.append(model.register_forward_pre_hook(gradient_check.OpenModel()))
    handles.append(model.register_forward_hook(gradient_check.CloseModel(), always_call=True))
    for stack in stacks:
        _hook_stack(model.get_submodule(stack.path), stack, prefixes)
        if isinstance(prefixes.attachment.engine, CacheEngine):
            for site in stack.sites[:1]:
                handles.append(model.get_submodule(site.path).register_forward_pre_hook(refuse_spread_heads))


def _hook_stack(module: nn.Module, stack: Stack, prefixes: Prefixes) -> None:
    handles, engine = prefixes.handles, prefixes.attachment.engine
    before = BeforeStack(prefixes, stack, tuple(signature(module.forward).parameters))
    # Last of the pre-hooks: what others add to the arguments is there already.
    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    handles.append(module.register_forward_hook(AfterStack(prefixes, stack), with_kwargs=True, prepend=True))
    beside = isinstance(engine, AttentionEngine) and not stack.hands_down
    leave = LeaveStack(prefixes.attachment.state_key(stack), beside=beside)
    handles.append(module.register_forward_hook(leave, always_call=True))
    if isinstance(stack.positions, PositionTable):
        table = module.get_submodule(stack.positions.path)
        if not isinstance(table, nn.Embedding):
            raise UnsupportedModelError(f"{stack.positions.path!r} of {stack.path!r} is no embedding table")
        handles.append(table.register_forward_hook(look_up_placed))


def carries_prefix(stack: nn.Module) -> bool:
    """Whether ``stack`` has a prefix already, perhaps through another model that shares it."""
    return any(isinstance(hook, BeforeStack) for hook in stack._forward_pre_hooks.values())
