"""One prefix on a live model: its numbers as the engines take them, and as checkpoints hold them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional

from prefixkit import placement
from prefixkit.adapter import STACKS, Stack, join_path
from prefixkit.additions import GATE, Addition, GatedPrefix, PrefixMemory, split_gate, split_memory
from prefixkit.as_it_was import as_it_was
from prefixkit.attention_engine import AttentionEngine
from prefixkit.cache_engine import CacheEngine
from prefixkit.embeddings import read_embeddings
from prefixkit.errors import AttachmentError, CheckpointError, EngineError
from prefixkit.frozen import with_frozen
from prefixkit.head import head_parameters
from prefixkit.layout import KeyValue, Layout
from prefixkit.method import EMBEDDINGS, MEMORY, PREFIX
from prefixkit.prefix_config import PrefixConfig

MODULE = "prefixkit"
"""Name of the submodule that holds the prefix encoder, by the prefix's name."""
IN_PIECES = (
    "this process holds a part only, as under FSDP1 (FullyShardedDataParallel); use fully_shard (FSDP2), or do this "
    "inside FullyShardedDataParallel.summon_full_params(model)"
)
SHARDED = "the prefix is sharded, and its gradients would stay in pieces; train through a call of the whole model"


@dataclass(eq=False)
class Attachment:
    """One prefix on one model.

    Attributes:
        config: What the prefix is.
        stacks: The model's stacks, each with only the sites that carry the prefix.
        layout: All its sites, in the order of the flat prefix.
        encoder: Its parameters: a module that returns the flat prefix.
        engine: What puts it in front of the attention.
        gives: What the encoder gives: the flat prefix, embeddings that the base reads, or a memory.
        identity: Marks the caches that hold this prefix.
        host: Identity of all prefixes of the model, once it is one of them.
        head_names: The parameters of its head by their name in the model, once it is on one.
        shapes: Shapes of all that a checkpoint holds, while no process has a part only.
        kept_head: Its head's values by parameter name, while another's or the base's are in the model.
        trained: Which of its parameters train when it is the active prefix, by their name in a checkpoint;
            ``None`` while it is active.
    """

    config: PrefixConfig
    stacks: tuple[Stack, ...]
    layout: Layout
    encoder: nn.Module
    engine: AttentionEngine | CacheEngine
    gives: str = PREFIX
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = ""
    head_names: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept_head: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: frozenset[str] | None = None

    @property
    def adds(self) -> bool:
        """Whether sites add to their attention's output, and nothing stands in front of their keys."""
        return self.config.gate or self.gives == MEMORY

    @property
    def beyond_keys_and_values(self) -> str:
        """What keys and values in front do not say of it; empty for a plain prefix."""
        if self.config.infix:
            return "an infix"
        return "a gate, or no keys and values" if self.adds else ""

    def flat_of(self, model: nn.Module) -> torch.Tensor:
        """:meth:`flat`, outside of a call."""
        module = model.get_submodule(next(stack.path for stack in self.stacks if stack.sites))
        if self.gives != EMBEDDINGS:
            return self.flat(module)
        with as_it_was(module):  # without the base's dropout
            return self.flat(module)

    def flat(self, module: nn.Module | None = None) -> torch.Tensor:
        """The flat prefix ``(P, width)``, or the memories, from the parameters as they are now.

        Args:
            module: The stack that reads, where the encoder gives embeddings.

        Raises:
            EngineError: If they are not here: offloaded, or sharded and not gathered by the model's own call.
        """
        if any(value.is_meta for value in self.encoder.parameters()):
            raise EngineError(
                f"the prefix itself is offloaded; keep it on a device, with {MODULE!r} in the device map, or offload "
                "the model before the prefix is applied"
            )
        pieces = self._in_pieces(dict(self.encoder.named_parameters()))
        if pieces:
            raise EngineError(f"{pieces}: {IN_PIECES}")
        flat = self._given()
        if placement.is_sharded(flat) and torch.is_grad_enabled():
            raise EngineError(SHARDED)
        gathered: torch.Tensor = placement.whole(flat)
        if self.gives != EMBEDDINGS:
            return gathered
        assert module is not None, "embeddings are read by a stack"
        return read_embeddings(module, self, gathered)

    def _given(self) -> torch.Tensor:
        """What the encoder gives, with the rows that stay.

        In training, ZeRO-3 hands out its parameters when they are asked for, and knows that it did.
        """
        if not torch.is_grad_enabled() and any(map(placement.is_partitioned, self.encoder.parameters())):
            with placement.gathered(self.encoder.parameters()), torch.enable_grad():
                return self._given().detach().clone()
        given: torch.Tensor = self.encoder()
        return with_frozen(self.encoder, given) if self.config.num_frozen_tokens else given

    def pieces(self, flat: torch.Tensor) -> dict[str, KeyValue]:
        """K and V by the site's place; of a layer with fewer virtual tokens the last ones."""
        every = dict(zip(self.tokens_by_place().items(), self.layout.split(flat), strict=True))
        return {place: KeyValue(*(part[:, -tokens:] for part in pair)) for (place, tokens), pair in every.items()}

    def tokens_by_place(self) -> dict[str, int]:
        """How many virtual tokens each site has, by its place."""
        lengths = dict(self.config.layer_tokens)
        return {site.place: lengths.get(site.layer, self.config.num_virtual_tokens) for site in self.layout.sites}

    def lengths(self) -> None:
        """``None``: all rows of a call have the same prefix."""

    def addition(self, flat: torch.Tensor) -> Addition | None:
        """What sites add to their attention's output; ``None`` where K and V stand in front.

        Raises:
            EngineError: If the gate is sharded and not gathered by the model's own call.
        """
        dropout = self.config.prefix_dropout
        if self.gives == MEMORY:
            return PrefixMemory(split_memory(flat, self.layout), dropout)
        if not self.config.gate:
            return None
        gate = self.encoder.get_parameter(GATE)
        if placement.is_sharded(gate) and torch.is_grad_enabled():
            raise EngineError(SHARDED)
        return GatedPrefix(self.pieces(flat), split_gate(placement.whole(gate), self.layout), dropout)

    def offset(self, stack: Stack) -> int:
        """How far the prefix moves the positions of ``stack``: P, or 0."""
        carries = stack.positions is not None and any(site.stack == stack.name for site in stack.sites)
        return self.config.num_virtual_tokens if carries and self.config.positions == "shift" else 0

    def state_key(self, stack: Stack) -> str:
        """The name of the stack's state beside the call."""
        return f"{self.host or self.identity}:{stack.path}"

    def shifts(self, stack: Stack) -> bool:
        """Whether the prefix moves the positions of ``stack``."""
        return bool(self.offset(stack))

    def at(self, path: str) -> Stack:
        """The stack at ``path``, with the sites of this prefix."""
        return next(stack for stack in self.stacks if stack.path == path)

    def prepared(self, flat: torch.Tensor, *, dtype: torch.dtype, training: bool) -> dict[str, KeyValue]:
        """K and V by the site's place in ``dtype``, with the prefix's dropout if ``training``."""
        dropped = functional.dropout(flat, self.config.prefix_dropout, training)
        pieces = self.pieces(dropped).items()
        return {place: KeyValue(key.to(dtype), value.to(dtype)) for place, (key, value) in pieces}

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: the encoder's parameters, and the tuned head's under ``head.``."""
        head = {f"head.{name}": value for name, value in self.head_values(model).items()}
        return {**self.encoder.state_dict(), **head}

    def head_values(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The values of its head, wherever they are, by parameter name."""
        head: Mapping[str, torch.Tensor] = self.kept_head or self.own_head(model)
        return {name: value.detach() for name, value in head.items()}

    def own_head(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the model that are its head, by name.

        Raises:
            AttachmentError: If something has put others in their place since.
        """
        head = head_parameters(model, self.config.head)
        if self.head_names and tuple(head) != self.head_names:
            changed = ", ".join(sorted(head.keys() ^ set(self.head_names)))
            raise AttachmentError(
                f"the head is not what it was when the prefix was applied ({changed}); if PEFT wraps it, let it do so "
                "first, or apply the prefix with head=False"
            )
        return head

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All that trains with it, by its name in a checkpoint."""
        head = {f"head.{name}": value for name, value in self.own_head(model).items()}
        return {**dict(self.encoder.named_parameters()), **head}

    def whole_tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """:meth:`tensors`, gathered where they are sharded: every process has to call.

        Raises:
            CheckpointError: If they are offloaded, or FSDP1 holds them in pieces.
        """
        partitioned = self._is_partitioned(model)
        with placement.gathered(self.parameters(model).values()):
            tensors = {name: placement.whole(value) for name, value in self.tensors(model).items()}
            if partitioned:
                tensors = {name: value.clone() for name, value in tensors.items()}
        offloaded = [name for name, value in tensors.items() if value.is_meta]
        if offloaded:
            raise CheckpointError(f"{', '.join(offloaded)}: offloaded, so there is nothing here to save")
        self.check_whole(tensors)
        return tensors

    def check_whole(self, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse to save parts for the whole.

        Raises:
            CheckpointError: If one of ``tensors`` is not as large as it was when the prefix was applied.
        """
        pieces = self._in_pieces(tensors)
        if pieces:
            raise CheckpointError(f"{pieces}: {IN_PIECES}")

    def note_shapes(self, model: nn.Module) -> None:
        """Remember the shapes that :meth:`tensors` have now."""
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors(model).items()}

    def _in_pieces(self, tensors: dict[str, torch.Tensor]) -> str:
        """What is not as large as it was, with its shapes; empty if all is."""
        here = {name: value for name, value in tensors.items() if not placement.is_partitioned(value)}
        found = ((name, tuple(value.shape), self.shapes.get(name)) for name, value in here.items())
        return ", ".join(f"{name!r} is {now} of {whole}" for name, now, whole in found if whole and now != whole)

    def writes(self, model: nn.Module) -> bool:
        """Whether this process saves the prefix: of those that share it, or the model's weights, only the first."""
        shared = self.is_sharded() or self._is_partitioned(model) or placement.tensor_mesh(model) is not None
        return not shared or torch.distributed.get_rank() == 0

    def _is_partitioned(self, model: nn.Module) -> bool:
        """Whether ZeRO-3 has taken some of the numbers that a checkpoint holds."""
        return any(map(placement.is_partitioned, self.parameters(model).values()))

    def is_sharded(self) -> bool:
        """Whether every process holds only a part of the prefix."""
        return any(map(placement.is_sharded, self.encoder.parameters()))

    def state_name(self, name: str) -> str:
        """The name in the model's state dict of what a checkpoint calls ``name``."""
        if name.startswith("head."):
            return name.removeprefix("head.")
        return join_path(MODULE, self.config.name, name)


def merged_stacks(attachments: Iterable[Attachment]) -> tuple[Stack, ...]:
    """The stacks of one model, each with the sites of all these prefixes, in the order in which they are called."""
    every = list(attachments)
    stacks = []
    for stack in every[0].stacks:
        sites = {site.place: site for one in every for site in one.at(stack.path).sites}
        ordered = sorted(sites.values(), key=lambda site: (site.layer, STACKS.index(site.stack)))
        stacks.append(replace(stack, sites=tuple(ordered)))
    return tuple(stacks)
