"""What the steps of one generation share: the flat prefix and what is made of it, worked out when the text begins.

So an MLP, the base's reading of virtual tokens, the mixture of a batch's prefixes and casts to another dtype are not
paid for again with every token. They are kept for the native cache that the steps hand on, as the keys and values of
the text are, and go with it. A prefix that has changed since is worked out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from prefixkit import placement, transformers_internals as internals

if TYPE_CHECKING:
    from prefixkit.attachment import Attachment

Made = TypeVar("Made")
Kept = dict[Hashable, Any]


@dataclass(frozen=True)
class _Mark:
    """A tensor as it was; only a write through ``.data`` to the same memory goes unseen."""

    tensor: torch.Tensor
    version: int
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Mark:
        return cls(tensor, tensor._version, tensor.data_ptr())

    def is_of(self, tensor: torch.Tensor) -> bool:
        return self.tensor is tensor and self.version == tensor._version and self.address == tensor.data_ptr()


@dataclass
class _Shelf:
    """What is kept for one cache, of prefixes as they were."""

    names: Hashable
    marks: list[_Mark]
    made: Kept = field(default_factory=dict)

    def is_of(self, names: Hashable, tensors: list[torch.Tensor]) -> bool:
        same = names == self.names and len(tensors) == len(self.marks)
        return same and all(mark.is_of(tensor) for mark, tensor in zip(self.marks, tensors, strict=True))


_shelves: WeakKeyDictionary[Any, _Shelf] = WeakKeyDictionary()


def kept_for(cache: Any, attachments: Iterable[Attachment], names: Hashable) -> Kept | None:
    """What earlier steps have made for the call that goes on from ``cache``; ``None`` where nothing may be kept.

    That is so in training, without a cache, in graphs, and where processes share the weights, which come and go.

    Args:
        cache: What the stack was called with.
        attachments: The prefixes that serve the call.
        names: What else tells their part in it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():  # type: ignore[attr-defined, no-untyped-call]
        return None
    length = internals.cached_tokens(cache)
    encoders = [one.encoder for one in attachments]
    if length is None or placement.may_share_weights() or any(encoder.training for encoder in encoders):
        return None
    tensors = [tensor for encoder in encoders for tensor in chain(encoder.parameters(), encoder.buffers())]
    if not tensors or not all(map(_is_plain, tensors)):
        return None
    names = names, torch.is_autocast_enabled(tensors[0].device.type)
    shelf = _shelves.get(cache)
    if not length or shelf is None or not shelf.is_of(names, tensors):
        shelf = _shelves[cache] = _Shelf(names, [_Mark.of(tensor) for tensor in tensors])
    return shelf.made


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor whose memory and changes can be told."""
    return type(tensor) in {torch.Tensor, nn.Parameter} and not tensor.is_meta and not tensor.is_inference()


def once(kept: Kept | None, name: Hashable, make: Callable[[], Made]) -> Made:
    """What ``make`` gives, from earlier steps if they have made it."""
    if kept is None or torch.compiler.is_compiling():  # a layer may be compiled and its stack not
        return make()
    if name not in kept:
        kept[name] = make()
    made: Made = kept[name]
    return made
