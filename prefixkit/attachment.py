"""A prefix on a live model: what is kept, and the hooks that carry it into every call.

An :class:`Attachment` is a plain object in the model's ``__dict__``. It holds no reference to the
model, so copying or pickling the model takes it along, whole.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from prefixkit import placement, transformers_internals as internals
from prefixkit.adapter import PositionTable, Stack, join_path
from prefixkit.additions import GATE, Addition, GatedPrefix, PrefixMemory, split_gate, split_memory
from prefixkit.as_it_was import as_it_was
from prefixkit.attention_engine import AttentionEngine, stand_before_attention
from prefixkit.beside_peft import peft_parameters
from prefixkit.cache_engine import CacheEngine
from prefixkit.embeddings import read_embeddings, reading_now
from prefixkit.errors import AttachmentError, CheckpointError, EngineError, UnsupportedModelError
from prefixkit.frozen import with_frozen
from prefixkit.head import head_parameters
from prefixkit.infix import BeforeLabels, after_labels
from prefixkit.layout import KeyValue, Layout
from prefixkit.method import EMBEDDINGS, MEMORY, PREFIX
from prefixkit.positions import count_positions, forget_positions, look_up_placed
from prefixkit.prefix_config import PrefixConfig
from prefixkit.prefix_state import take_away

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "_prefixkit"
"""Where the attachment stands in the model's ``__dict__``."""
MODULE = "prefixkit"
"""Name of the submodule that holds the prefix encoder, by the prefix's name."""
IN_PIECES = (
    "this process holds a part only, as under FSDP1 (FullyShardedDataParallel); use fully_shard (FSDP2), or do this "
    "inside FullyShardedDataParallel.summon_full_params(model)"
)
SHARDED = "the prefix is sharded, and its gradients would stay in pieces; train through a call of the whole model"
FLAT = "prefix_flat"
"""The keyword under which a model with two stacks hands them the flat prefix, computed once."""


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
        trained_before: ``requires_grad`` of every base parameter before ``apply``.
        base_head: The head's values before ``apply``, by parameter name.
        disablers: How many :func:`prefixkit.disabled` blocks are under way.
        identity: Marks the caches that hold this prefix.
        displaced: What the instance answered by itself before, where the prefix answers now.
        homes: Files whose attention functions the sites call.
        shapes: Shapes of all that a checkpoint holds, while no process has a part only.
    """

    config: PrefixConfig
    stacks: tuple[Stack, ...]
    layout: Layout
    encoder: nn.Module
    engine: AttentionEngine | CacheEngine
    gives: str = PREFIX
    trained_before: dict[str, bool] = field(default_factory=dict)
    base_head: dict[str, torch.Tensor] = field(default_factory=dict)
    disablers: int = 0
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    handles: list[Any] = field(default_factory=list)
    displaced: dict[str, Any] = field(default_factory=dict)
    homes: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        """False inside :func:`prefixkit.disabled`."""
        return not self.disablers

    def __getstate__(self) -> dict[str, Any]:
        """Inside ``disabled`` the model has its old head, and a copy would keep it for ever."""
        if not self.enabled:
            raise AttachmentError("copy or pickle the model outside of prefixkit.disabled")
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a spawned process that unpickles the model, nothing stands before the attention functions yet."""
        self.__dict__.update(state)
        stand_before_attention(self.homes)

    @property
    def adds(self) -> bool:
        """Whether sites add to their attention's output, and nothing stands in front of their keys."""
        return self.config.gate or self.gives == MEMORY

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
        flat = with_frozen(self.encoder, self.encoder()) if self.config.num_frozen_tokens else self.encoder()
        if placement.is_sharded(flat) and torch.is_grad_enabled():
            raise EngineError(SHARDED)
        gathered: torch.Tensor = placement.whole(flat)
        if self.gives != EMBEDDINGS:
            return gathered
        assert module is not None, "embeddings are read by a stack"
        return read_embeddings(module, self, gathered)

    def pieces(self, flat: torch.Tensor) -> dict[str, KeyValue]:
        """K and V by the site's place; of a layer with fewer virtual tokens the last ones."""
        lengths = dict(self.config.layer_tokens)
        every = {site.place: piece for site, piece in zip(self.layout.sites, self.layout.split(flat), strict=True)}
        for site in self.layout.sites:
            if site.layer in lengths:
                first = self.config.num_virtual_tokens - lengths[site.layer]
                every[site.place] = KeyValue(*(part[:, first:] for part in every[site.place]))
        return every

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
        return f"{self.identity}:{stack.path}"

    def prepared(self, flat: torch.Tensor, *, dtype: torch.dtype, training: bool) -> dict[str, KeyValue]:
        """K and V by the site's place in ``dtype``, with the prefix's dropout if ``training``."""
        dropped = functional.dropout(flat, self.config.prefix_dropout, training)
        pieces = self.pieces(dropped).items()
        return {place: KeyValue(key.to(dtype), value.to(dtype)) for place, (key, value) in pieces}

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: the encoder's parameters, and the tuned head's under ``head.``."""
        # While disabled, the model has its old head and the tuned one is kept aside.
        head: Mapping[str, torch.Tensor] = own_head(model, self) if self.enabled else self.base_head
        return {**self.encoder.state_dict(), **{f"head.{name}": value.detach() for name, value in head.items()}}

    def whole_tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """:meth:`tensors`, gathered where they are sharded: every process has to call.

        Raises:
            CheckpointError: If they are offloaded, or FSDP1 holds them in pieces.
        """
        tensors = {name: placement.whole(value) for name, value in self.tensors(model).items()}
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
        found = ((name, tuple(value.shape), self.shapes.get(name)) for name, value in tensors.items())
        return ", ".join(f"{name!r} is {now} of {whole}" for name, now, whole in found if whole and now != whole)

    def writes(self) -> bool:
        """Whether this process saves the prefix: of those that share it only the first."""
        return not self.is_sharded() or torch.distributed.get_rank() == 0

    def is_sharded(self) -> bool:
        """Whether every process holds only a part of the prefix."""
        return any(map(placement.is_sharded, self.encoder.parameters()))

    def state_name(self, name: str) -> str:
        """The name in the model's state dict of what a checkpoint calls ``name``."""
        if name.startswith("head."):
            return name.removeprefix("head.")
        return join_path(MODULE, self.config.name, name)


class BeforeModel:
    """Forward pre-hook of the model: computes the flat prefix once for all its stacks."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the flat prefix to the keyword arguments."""
        if not self.attachment.enabled:
            return None
        return args, {**kwargs, FLAT: self.attachment.flat()}


class BeforeStack:
    """Forward pre-hook of a stack: gives every argument its name and lets the engine act on them."""

    def __init__(self, attachment: Attachment, stack: Stack, names: tuple[str, ...]) -> None:
        self.attachment = attachment
        self.stack = stack
        self.names = names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with the prefix, or as they were if it is disabled."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        flat = arguments.pop(FLAT, None)
        forget_positions()
        engine = self.attachment.engine
        reading = reading_now(self.attachment)
        if reading is not None:
            return (), AttentionEngine.send(module, self.stack, arguments, self.attachment, reading)
        if self.attachment.enabled and not self.stack.sites:
            count_positions(module, self.stack, arguments)
        if not self.attachment.enabled or not self.stack.sites:
            return (), engine.off(module, self.stack, arguments, self.attachment)
        if flat is None:
            flat = self.attachment.flat(module)
        return (), engine.before(module, self.stack, arguments, self.attachment, flat)


class AfterStack:
    """Forward hook of a stack: lets the engine act on the output."""

    def __init__(self, attachment: Attachment, stack: Stack) -> None:
        self.attachment = attachment
        self.stack = stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, as the caller would see it without a prefix."""
        if not self.attachment.enabled or reading_now(self.attachment) is not None:
            return output
        return self.attachment.engine.after(module, self.stack, kwargs, self.attachment, output)


class LeaveStack:
    """Forward hook of a stack, also where its forward fails: nothing of the call stays behind."""

    def __init__(self, attachment: Attachment, stack: Stack) -> None:
        self.attachment = attachment
        self.stack = stack

    def __call__(self, *_: Any) -> None:
        """Take the state away that travelled beside the call."""
        take_away(self.attachment.state_key(self.stack))


def find(model: nn.Module) -> Attachment | None:
    """The attachment of ``model``, if it has one."""
    attachment: Attachment | None = model.__dict__.get(KEY)
    return attachment


def require(model: nn.Module) -> Attachment:
    """The attachment of ``model``.

    Raises:
        AttachmentError: If it has none.
    """
    attachment = find(model)
    if attachment is None:
        raise AttachmentError(
            f"this {type(model).__name__} has no prefix; call prefixkit.apply or prefixkit.load first"
        )
    return attachment


def carries_prefix(stack: nn.Module) -> bool:
    """Whether ``stack`` has a prefix already, perhaps through another model that shares it."""
    return any(isinstance(hook, BeforeStack) for hook in stack._forward_pre_hooks.values())


def install(model: PreTrainedModel, attachment: Attachment) -> None:
    """Put a finished attachment on the model: all of it, or on an error nothing."""
    try:
        model.__dict__[KEY] = attachment
        attachment.trained_before = {name: value.requires_grad for name, value in model.named_parameters()}
        # A LoRA that is on the model trains together with the prefix.
        kept = [parameter for parameter in peft_parameters(model).values() if parameter.requires_grad]
        model.requires_grad_(False)
        for parameter in kept:
            parameter.requires_grad_(True)
        for name, value in head_parameters(model, attachment.config.head).items():
            attachment.base_head[name] = value.detach().clone()
            value.requires_grad_(True)
        attachment.note_shapes(model)
        model.add_module(MODULE, nn.ModuleDict({attachment.config.name: attachment.encoder}))
        attachment.encoder.train(model.training)
        attachment.engine.attach(model, attachment)
        _add_hooks(model, attachment)
    except BaseException:
        uninstall(model, attachment)
        raise


def uninstall(model: PreTrainedModel, attachment: Attachment) -> None:
    """Give back the very base. Safe on a half-installed attachment."""
    while attachment.handles:
        attachment.handles.pop().remove()
    if attachment.base_head.keys() == head_parameters(model, attachment.config.head).keys():
        swap_head(model, attachment)
    attachment.engine.detach(model, attachment)
    model._modules.pop(MODULE, None)
    for name, value in model.named_parameters():
        value.requires_grad_(attachment.trained_before.get(name, value.requires_grad))
        if not value.requires_grad:
            value.grad = None
    model.__dict__.pop(KEY, None)


def own_head(model: nn.Module, attachment: Attachment) -> dict[str, nn.Parameter]:
    """The parameters of the head that trains with the prefix, by name.

    Raises:
        AttachmentError: If something has put others in their place since.
    """
    head = head_parameters(model, attachment.config.head)
    if attachment.base_head and head.keys() != attachment.base_head.keys():
        changed = ", ".join(sorted(head.keys() ^ attachment.base_head.keys()))
        raise AttachmentError(
            f"the head is not what it was when the prefix was applied ({changed}); if PEFT wraps it, let it do so "
            "first, or apply the prefix with head=False"
        )
    return head


def swap_head(model: nn.Module, attachment: Attachment) -> None:
    """Exchange the head's values with the base's; calling it again puts them back.

    By ``.data``, so that a graph built before still finds its weights after the second call.
    """
    head = own_head(model, attachment)
    for name, value in head.items():
        value.data, attachment.base_head[name] = attachment.base_head[name].to(value), value.data


def _add_hooks(model: PreTrainedModel, attachment: Attachment) -> None:
    handles = attachment.handles
    handed = internals.takes_any_keyword(model) and all(stack.hands_down for stack in attachment.stacks)
    if attachment.config.infix:
        labels = BeforeLabels(attachment.identity, tuple(signature(model.forward).parameters))
        handles.append(model.register_forward_pre_hook(labels, with_kwargs=True))
        handles.append(model.register_forward_hook(after_labels, always_call=True))
    if sum(bool(stack.sites) for stack in attachment.stacks) > 1 and handed:
        handles.append(model.register_forward_pre_hook(BeforeModel(attachment), with_kwargs=True))
    for stack in attachment.stacks:
        module = model.get_submodule(stack.path)
        before = BeforeStack(attachment, stack, tuple(signature(module.forward).parameters))
        # Last of the pre-hooks: what others add to the arguments is there already.
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(AfterStack(attachment, stack), with_kwargs=True, prepend=True))
        if isinstance(attachment.engine, AttentionEngine) and not stack.hands_down:
            handles.append(module.register_forward_hook(LeaveStack(attachment, stack), always_call=True))
        for site in stack.sites[:1]:
            inside = model.get_submodule(site.path)
            handles.append(inside.register_forward_pre_hook(placement.refuse_tensor_parallel))
        if isinstance(stack.positions, PositionTable):
            table = module.get_submodule(stack.positions.path)
            if not isinstance(table, nn.Embedding):
                raise UnsupportedModelError(f"{stack.positions.path!r} of {stack.path!r} is no embedding table")
            handles.append(table.register_forward_hook(look_up_placed))
