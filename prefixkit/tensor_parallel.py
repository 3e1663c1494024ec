"""The heads that this process computes, where tensor parallel has spread those of an attention over several.

Every process has the whole prefix, and puts in front of its own heads' keys the part that is theirs. The gradient of
a part comes from the process that has it, so the shares of all processes are added up on the way back to the prefix,
which gets the same gradient everywhere. Where every process computes all heads, as under plans that gather or leave
attention alone, each one has the whole gradient already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import placement, transformers_internals as internals
from prefixkit.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefixkit.adapter import Site, Stack


@dataclass(frozen=True)
class Heads:
    """Which of a site's heads of keys and values this process computes: all, if there is no ``mesh``.

    Attributes:
        first: The first one.
        count: How many there are.
        whole: How many the site has.
        mesh: The processes over which the heads are spread.
    """

    first: int = 0
    count: int = 0
    whole: int = 0
    mesh: Any = None

    def of(self, *parts: torch.Tensor, dim: int = -3) -> tuple[torch.Tensor, ...]:
        """The part of these heads, of tensors with all heads in ``dim``; gradients come from all processes."""
        if self.mesh is None:
            return parts
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            # One by one: of a loss on attention maps, values have no part, and no gradient that could be missed.
            parts = tuple(SharedGradient.apply(self.mesh.get_group(), part) for part in parts)  # type: ignore[no-untyped-call]
        return tuple(part.narrow(dim, self.first, self.count) for part in parts)

    def gathered(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All heads of tensors ``(…, heads, tokens, dim)`` that hold these; on every process the same."""
        if self.mesh is None or self.count == self.whole:
            return parts
        return tuple(Gathered.apply(self, part) for part in parts)  # type: ignore[no-untyped-call]


ALL = Heads()
"""Nothing is spread here."""


class SharedGradient(torch.autograd.Function):
    """A tensor as it is; in the backward pass the gradients of all processes, added up."""

    @staticmethod
    def forward(ctx: Any, group: Any, part: torch.Tensor) -> torch.Tensor:
        """The same numbers."""
        ctx.group = group
        ctx.set_materialize_grads(False)  # a gradient that is missing is no zero, and somebody looks for it
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        """The sum."""
        if grad is None:
            return None, None
        summed = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=ctx.group)
        return None, summed


class Gathered(torch.autograd.Function):
    """The heads of all processes; every one of them has the whole gradient, and keeps that of its own heads."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, own: torch.Tensor) -> torch.Tensor:
        """All heads in their order."""
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        size: int = heads.mesh.size()
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
        torch.distributed.all_gather(parts, own.contiguous(), group=heads.mesh.get_group())
        copies = max(1, size * heads.count // heads.whole)  # where several processes have the same heads
        return torch.cat(parts[::copies], dim=-3)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        """The gradient of the own heads."""
        return None, None if grad is None else grad.narrow(-3, ctx.heads.first, ctx.heads.count)


def heads_here(
    module: nn.Module, site: Site, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor | None = None
) -> Heads:
    """The heads of one attention call, as its keys and the live weights of ``module`` show them.

    Args:
        module: The site's module.
        site: Where this is.
        key: ``(batch, kv_heads here, keys, key_dim)``.
        value: As ``key``.
        query: ``(batch, heads here, queries, key_dim)``, where it is known.

    Raises:
        EngineError: If these are not what the adapter said, or it cannot be told which heads they are.
    """
    here = key.shape[1]
    if here > site.kv_heads or (key.shape[3], value.shape[3]) != (site.key_dim, site.value_dim):
        raise _other_heads(site, key, value)
    mesh = placement.tensor_mesh(module)
    if mesh is None:
        if here != site.kv_heads:
            raise _other_heads(site, key, value)
        return ALL
    if mesh.ndim != 1 or placement.is_sharded(key):
        raise EngineError(
            f"tensor parallel has spread the heads of {site.path!r} over a mesh of {mesh.ndim} dimensions, or hands "
            "pieces (DTensor) to the attention function; use a plan over one dimension, with local outputs"
        )
    if here == site.kv_heads:
        every = _query_heads(module, site)
        asked = None if query is None else query.shape[1]
        if every == {asked}:
            return ALL
        if torch.is_grad_enabled() and (asked is None or not every or asked in every):
            raise EngineError(
                f"the weights of {site.path!r} are spread over devices (tensor parallel) and its keys are not, and it "
                "cannot be told whether each device has the whole gradient of the prefix or a part: its queries have "
                f"{asked or '?'} heads here, and by its config and module {sorted(every) or '?'} in all"
            )
    return Heads(first=_first(site, here, mesh), count=here, whole=site.kv_heads, mesh=mesh)


def _query_heads(module: nn.Module, site: Site) -> set[int]:
    """How many heads the queries have on all processes together, as config and module say; best one number."""
    groups = getattr(module, "num_key_value_groups", None)
    config = internals.config_of(module) if internals.has_config(module) else None
    stated = getattr(config, "num_attention_heads", None)
    said = (stated, groups * site.kv_heads if isinstance(groups, int) else None)
    return {heads for heads in said if isinstance(heads, int)}


def _first(site: Site, here: int, mesh: Any) -> int:
    """The first head of this process. Heads that are fewer than processes stand on neighbours, as their queries do."""
    size, rank = mesh.size(), mesh.get_local_rank()
    if here == site.kv_heads:
        return 0
    if here * size == site.kv_heads:
        return int(rank * here)
    if here == 1 and size % site.kv_heads == 0:
        return int(rank * site.kv_heads // size)
    raise EngineError(
        f"{size} processes do not share the {site.kv_heads} heads of {site.path!r} evenly: this one has {here} of "
        "them, and it cannot be told which; use a number of processes that divides the heads"
    )


def _other_heads(site: Site, key: torch.Tensor, value: torch.Tensor) -> EngineError:
    return EngineError(
        f"{site.path!r} has {key.shape[1]} heads of keys ({key.shape[3]}) and values ({value.shape[3]}) here, and the "
        f"prefix {site.kv_heads} of ({site.key_dim}) and ({site.value_dim}); the adapter is wrong, or the heads are "
        "spread over devices (tensor parallel) in a way that the weights do not show"
    )


def refuse_spread_heads(module: nn.Module, _args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a site that the cache engine serves: it fills caches before anything shows the heads.

    Raises:
        EngineError: If tensor parallel has spread the weights.
    """
    if placement.tensor_mesh(module) is not None:
        raise _no_cache(type(module).__name__)


def check_whole_heads(model: nn.Module, stacks: Iterable[Stack]) -> None:
    """Raise where a native cache would hold the heads of all processes.

    Raises:
        EngineError: If tensor parallel has spread the weights of a site.
    """
    if placement.is_fully_sharded(model):  # their pieces are those of FSDP2
        return
    for site in (site for stack in stacks for site in stack.sites):
        module = model.get_submodule(site.path)
        if placement.tensor_mesh(module) is not None:
            raise _no_cache(type(module).__name__)


def _no_cache(name: str) -> EngineError:
    return EngineError(
        f"the heads of this {name} are spread over devices (tensor parallel), and a native cache with the prefix would "
        "hold all of them; use engine='attention'"
    )


def from_first(model: nn.Module, *tensors: torch.Tensor) -> None:
    """Give every process over which tensor parallel has spread ``model`` the numbers of the first one, in place."""
    mesh = placement.tensor_mesh(model)
    if mesh is None:
        return
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    for tensor in tensors:
        torch.distributed.broadcast(tensor, first, group=group)
