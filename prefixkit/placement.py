"""Where a model's weights are, and in which type: devices, pieces on several processes, autocast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def is_partitioned(value: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken a parameter's numbers away, and keeps a part of them."""
    return hasattr(value, "ds_id") and not value.numel()


@contextmanager
def gathered(values: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, parameters of ZeRO-3 are whole, for reading; all processes have to call."""
    partitioned = [value for value in values if is_partitioned(value)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


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


def whole_weights(module: nn.Module) -> AbstractContextManager[Any]:
    """:class:`WholeWeights` where FSDP2 shards parts of ``module``, else nothing."""
    return WholeWeights() if may_share_weights() and is_fully_sharded(module) else nullcontext()


def may_share_weights() -> bool:
    """Whether there are other processes, with which this one may share its weights."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded any module of ``model``, whose class has one more base then."""
    return any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)


def tensor_mesh(module: nn.Module) -> Any:
    """The processes over which tensor parallel has spread weights of ``module``, a ``DeviceMesh``; ``None``: none.

    For a module whose weights are its own now: FSDP2 gathers those of a layer while it runs.
    """
    if not may_share_weights():
        return None
    spread = (weight for weight in module.parameters() if is_sharded(weight))
    pieces: Any = next((weight for weight in spread if any(map(_cuts, weight.placements))), None)  # type: ignore[attr-defined]
    return None if pieces is None else pieces.device_mesh


def _cuts(place: Any) -> bool:
    """Whether a DTensor's placement gives each process a part: ``Shard``, or a strided one, which is no subclass."""
    return not place.is_replicate() and not place.is_partial()


def like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``value`` where ``other`` is, of its dtype, and in pieces on the processes that have pieces of ``other``."""
    if not is_sharded(other) or is_sharded(value):
        return value.to(other)
    from torch.distributed.tensor import distribute_tensor

    spread: Any = other
    there = value.to(device=spread.device, dtype=spread.dtype)
    return distribute_tensor(there, spread.device_mesh, spread.placements, src_data_rank=None)


def real_device(model: nn.Module) -> torch.device:
    """The first device that holds weights of ``model``; offloaded ones are on none."""
    devices = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next(devices, torch.device("cpu"))
