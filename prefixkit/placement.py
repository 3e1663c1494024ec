"""Where a model's weights are, and in which type: devices, pieces on several processes, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prefixkit.errors import EngineError

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch was built without distributed, or is older than FSDP2's public place
    SHARDED: tuple[type, ...] = ()
else:
    SHARDED = (DTensor,)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which ``module`` makes its keys: the autocast dtype, else that of its weights."""
    weights = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    if weights is None:
        raise EngineError(
            f"{type(module).__name__} has no parameters of its own here, as in a replica of nn.DataParallel; "
            "use engine='attention'"
        )
    kind = "cpu" if weights.is_meta else weights.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights.dtype


def is_sharded(value: object) -> bool:
    """Whether this process holds only its part of a tensor: a ``DTensor`` of FSDP2 or tensor parallel."""
    return isinstance(value, SHARDED)


def whole(value: Any) -> Any:
    """A sharded tensor gathered from the processes that share it, all of which have to call; all else as it is."""
    return value.full_tensor() if is_sharded(value) else value


class WholeWeights(TorchFunctionMode):
    """Inside, what an operation is given is whole: for reading weights outside of their own layer's call.

    FSDP2 gathers the weights of a layer while that layer runs, and at no other time.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``function`` of the whole tensors; asking for a device or a shape gathers nothing."""
        if getattr(function, "__name__", "") != "__get__":
            args = tuple(whole(value) for value in args)
            kwargs = {name: whole(value) for name, value in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


def whole_weights() -> AbstractContextManager[Any]:
    """:class:`WholeWeights` where there is more than this process, else nothing."""
    return WholeWeights() if may_share_weights() else nullcontext()


def may_share_weights() -> bool:
    """Whether there are other processes, with which this one may share its weights."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_spread(model: nn.Module) -> bool:
    """Whether the weights of ``model`` are spread over processes already, by FSDP2 or tensor parallel."""
    return (getattr(model, "tp_size", None) or 1) > 1 or any(map(is_sharded, model.parameters()))


def refuse_tensor_parallel(module: nn.Module, _args: tuple[Any, ...]) -> None:
    """Forward pre-hook of an attention module, whose own weights FSDP2 has gathered by then.

    Raises:
        EngineError: If they are still in pieces while gradients are recorded.
    """
    if torch.is_grad_enabled() and any(map(is_sharded, module.parameters())):
        raise EngineError(
            f"the heads of this {type(module).__name__} are spread over devices (tensor parallel), and the prefix "
            "would get a part of its gradient only; tensor parallel is not supported in training"
        )


def real_device(model: nn.Module) -> torch.device:
    """The first device that holds weights of ``model``; offloaded ones are on none."""
    devices = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next(devices, torch.device("cpu"))
