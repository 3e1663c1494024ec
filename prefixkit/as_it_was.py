"""Forward passes that leave a model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefixkit import placement

_PARTS = ("_modules", "_parameters", "_buffers")
_CONTAINERS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Attributes of every module that hold its parts and its hooks."""


@dataclass(frozen=True)
class Snapshot:
    """All that a forward may change of one module but its weights."""

    module: nn.Module
    attributes: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    values: dict[str, torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """What ``module`` is now."""
        attributes = {name: value for name, value in vars(module).items() if name not in _CONTAINERS}
        parts = {name: dict(vars(module)[name]) for name in _PARTS}
        values = {name: kept.clone() for name, kept in module._buffers.items() if kept is not None}
        return cls(module, attributes, parts, values)

    def restore(self) -> None:
        """Make it that again."""
        own = vars(self.module)
        for name in [name for name in own if name not in _CONTAINERS and name not in self.attributes]:
            del own[name]
        own.update(self.attributes)
        for name, part in self.parts.items():
            own[name].clear()
            own[name].update(part)
        for name, values in self.values.items():
            if not values.is_meta:
                own["_buffers"][name].copy_(values)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients inside; afterwards everything is as before."""
    snapshots = [Snapshot.of(module) for module in model.modules()]
    device = placement.real_device(model)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for snapshot in snapshots:
                snapshot.restore()
