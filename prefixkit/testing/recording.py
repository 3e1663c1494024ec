"""What a forward pass of a bare model really calls, seen without any adapter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from prefixkit.testing.arithmetic import Watch, watched
from prefixkit.testing.attention_call import AttentionCall
from prefixkit.transformers_internals import attention_implementation_of

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
    """Also for stacks with a config of their own, which some versions of transformers leave out."""
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
def recorded_calls(model: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """The attention calls of the bare ``model`` inside the block, in order; it runs eager attention there.

    Where it calls no attention function, they are found in what it computes.
    """
    eager = eager_functions(model)
    if not eager:
        with watched(Watch(model)) as watch:
            yield watch.found
        return
    calls: list[AttentionCall] = []
    paths = {id(module): path for path, module in model.named_modules()}

    def recorder(function: Any) -> Any:
        def record(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
            call = AttentionCall(
                path=paths[id(module)], query=query, key=key, value=value, mask=attention_mask, options=options
            )
            calls.append(call)
            return function(module, query, key, value, attention_mask, **options)

        return record

    with attention_implementation(model, "eager"):
        try:
            for name, function in eager.items():
                setattr(sys.modules[name], EAGER, recorder(function))
            yield calls
        finally:
            for name, function in eager.items():
                setattr(sys.modules[name], EAGER, function)
