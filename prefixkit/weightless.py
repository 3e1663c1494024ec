"""A model from its config alone, whose weights take next to no memory: enough to see where a prefix goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LARGE, HUGE = 2**20, 2**28
"""Numbers from which a weight is not kept by itself, and from which it does not even hold so many."""
SLACK = 4093
SCALE = 0.05


def weightless(kind: type[Any], config: PretrainedConfig) -> PreTrainedModel:
    """A model of the class ``kind`` with random weights that share their memory, so that a model of any size fits.

    Small weights, such as position tables and new heads, have numbers of their own. Large ones are views of one
    run of random numbers, each from another place on; in huge ones each row starts one number later than the row
    before. The forward pass still tells one token, one position and one layer from another. The meta device would
    not do: what watches a model compares numbers.

    Args:
        kind: A model class of transformers, or one of its auto classes.
        config: Its config.
    """
    with _parameters_on_meta():
        model: PreTrainedModel = (
            # Without the word, transformers asks on the terminal whether to run code that the config names.
            kind.from_config(config, trust_remote_code=False) if hasattr(kind, "from_config") else kind(config)
        )
    numbers = _Numbers(model)
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:  # tied weights stay tied
                if id(value) not in filled:
                    filled[id(value)] = numbers.parameter(value)
                module._parameters[name] = filled[id(value)]
    whole: nn.Module = model
    whole.eval()
    return model


class _Numbers:
    """Random numbers for weights, most of them used many times."""

    def __init__(self, model: nn.Module) -> None:
        self.generator = torch.Generator().manual_seed(0)
        sizes = [value.numel() if value.numel() < HUGE else sum(value.shape) for value in model.parameters()]
        large = max((size for size in sizes if size >= LARGE), default=0)
        self.shared = self.random(large + SLACK)
        self.count = 0

    def random(self, size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator) * SCALE

    def parameter(self, like: nn.Parameter) -> nn.Parameter:
        """A parameter of the shape of ``like``."""
        self.count += 1
        start = self.shared[self.count % SLACK :]
        if like.numel() < LARGE:
            # Scales of norms are near one, so that nothing vanishes on the way up.
            values = self.random(like.numel()).view(like.shape) + (1 if like.ndim == 1 else 0)
        elif like.numel() < HUGE:
            values = start[: like.numel()].view(like.shape)
        else:
            values = self.random(sum(like.shape)).as_strided(like.shape, (1,) * like.ndim)
        return nn.Parameter(values, requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, parameters are made without memory; buffers, which a config determines, are real."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, value)
        if value is not None and not value.is_meta:
            module._parameters[name] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    nn.Module.register_parameter = without_memory  # type: ignore[assignment,method-assign] # as it was, below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
