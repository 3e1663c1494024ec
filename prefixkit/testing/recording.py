"""What a forward pass of a bare model really calls, seen without any adapter.

Attention on transformers' attention interface is seen at the attention function. Other attention is seen
where it updates its cache: which module does that, with which keys and values, and for which layer. Without
a cache it is found in what a model computes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from prefixkit.testing.arithmetic import Watch, watched
from prefixkit.testing.attention_call import AttentionCall
from prefixkit.transformers_internals import attention_implementation_of, takes_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EAGER = "eager_attention_forward"


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside the block the model uses the attention implementation ``name``."""
    before = attention_implementation_of(model.config)
    set_attention_implementation(model, name)
    try:
        yield
    finally:
        set_attention_implementation(model, before)


def set_attention_implementation(model: PreTrainedModel, name: str) -> None:
    """Also for stacks with a config of their own, which some versions of transformers leave out.

    Off the interface it is settled when a model is made.
    """
    if not is_on_interface(model):
        return
    stacks: list[Any] = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    for stack in stacks:
        stack.set_attn_implementation(name)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what transformers compiles by itself (flex attention) as plain torch: the same numbers, without the wait."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        # What transformers itself calls to make and use block masks.
        warnings.filterwarnings("ignore", "_compile flag on create_block_mask", DeprecationWarning)
        warnings.filterwarnings("ignore", "(?s).*flex_attention called without torch.compile", UserWarning)
        warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
        yield


def eager_functions(model: PreTrainedModel) -> dict[str, Any]:
    """The eager attention functions of transformers' interface that ``model`` may call, by module."""
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    return {name: getattr(sys.modules[name], EAGER) for name in files if hasattr(sys.modules[name], EAGER)}


@contextmanager
def replaced_attention(model: PreTrainedModel, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block ``model`` runs eager attention, with ``replacement(function)`` for each of its functions."""
    eager = eager_functions(model)
    with attention_implementation(model, "eager"):
        try:
            for name, function in eager.items():
                setattr(sys.modules[name], EAGER, replacement(function))
            yield
        finally:
            for name, function in eager.items():
                setattr(sys.modules[name], EAGER, function)


@contextmanager
def recorded_calls(model: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """The attention calls of the bare ``model`` inside the block, in order; it runs eager attention there.

    Off the interface a model that takes a cache runs with one, whatever its config says. In one that takes
    none the calls are found in what it computes.
    """
    if not is_on_interface(model):
        with _off_the_interface(model) as calls:
            yield calls
        return
    calls = []
    paths = {id(module): path for path, module in model.named_modules()}

    def recorder(function: Any) -> Any:
        def record(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
            call = AttentionCall(
                path=paths[id(module)], query=query, key=key, value=value, mask=attention_mask, options=options
            )
            calls.append(call)
            return function(module, query, key, value, attention_mask, **options)

        return record

    with replaced_attention(model, recorder):
        yield calls


def is_on_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention is written for transformers' attention interface."""
    return bool(eager_functions(model))


@contextmanager
def _off_the_interface(model: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    if model.can_generate() and takes_cache(model):
        with _with_cache(model), _recorded_updates(model) as calls:
            yield calls
    else:
        with watched(Watch(model)) as watch:
            yield watch.found


@contextmanager
def _with_cache(model: PreTrainedModel) -> Iterator[None]:
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


@contextmanager
def _recorded_updates(model: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """The updates of the cache inside the block, each with the innermost module that runs."""
    calls: list[AttentionCall] = []
    running: list[str] = []
    original = Cache.update

    def update(cache: Any, key: Any, value: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        keys, values = original(cache, key, value, layer_idx, *args, **options)
        calls.append(
            AttentionCall(path=running[-1], query=None, key=keys, value=values, mask=None, options={}, layer=layer_idx)
        )
        return keys, values

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, running, path)))
        handles.append(module.register_forward_hook(partial(_leave, running), always_call=True))
    try:
        Cache.update = update  # type: ignore[assignment,method-assign]
        yield calls
    finally:
        Cache.update = original  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def _enter(running: list[str], path: str, *_: Any) -> None:
    running.append(path)


def _leave(running: list[str], *_: Any) -> None:
    running.pop()


def seen_inside(model: PreTrainedModel, path: str, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens each query of the attention module ``path`` sees, ``(tokens, tokens)``, found out by perturbation.

    One token's vector at a time is changed at the entrance of that module, so that nothing but a direct
    look at it can change another's output.
    """
    attention = model.get_submodule(path)

    def output(changed: int | None) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            states = (args[0] if args else options["hidden_states"]).clone()
            if changed is not None:
                states[:, changed] += 1 + states[:, changed].flip(-1)
            return ((states, *args[1:]), options) if args else (args, {**options, "hidden_states": states})

        handles = [
            attention.register_forward_pre_hook(before, with_kwargs=True),
            attention.register_forward_hook(lambda *call: kept.append(_first_tensor(call[-1]))),
        ]
        try:
            with torch.no_grad():
                model(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        return kept[0][0]  # the one row

    plain = output(None)
    changes = [(output(token) - plain).abs().amax(-1) > 1e-6 for token in range(ids.shape[1])]
    return torch.stack(changes, dim=1)


def _first_tensor(output: Any) -> torch.Tensor:
    """A module's output, or the first that its output holds."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def window_inside(model: PreTrainedModel, path: str, ids: torch.Tensor) -> int | None:
    """How many tokens the last query of the attention module ``path`` sees; ``None``: all of them.

    An encoder-decoder off the interface is taken to have no window.
    """
    if model.config.is_encoder_decoder:
        return None
    seen = int(seen_inside(model, path, ids)[-1].sum())
    return None if seen == ids.shape[1] else seen
