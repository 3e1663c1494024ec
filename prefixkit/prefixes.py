"""All prefixes of one model, one of them active: what is kept of the base, and how they get on and off.

A :class:`Prefixes` is a plain object in the model's ``__dict__``. It holds no reference to the model, so copying
or pickling the model takes it along, whole.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit.attachment import MODULE, Attachment, merged_stacks
from prefixkit.attention_engine import stand_before_attention
from prefixkit.beside_peft import peft_parameters
from prefixkit.call import batch_of
from prefixkit.embeddings import reading_now
from prefixkit.errors import AttachmentError, ConfigError, closest
from prefixkit.gradient_check import GradientCheck
from prefixkit.head import head_parameters
from prefixkit.hooks import add_hooks
from prefixkit.kept import Kept, kept_for, once
from prefixkit.placement import like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.adapter import Stack
    from prefixkit.mixture import Mixture, Rows
    from prefixkit.prefix_state import PrefixState

KEY = "_prefixkit"
"""Where the prefixes stand in the model's ``__dict__``."""


@dataclass(eq=False)
class Prefixes:
    """The prefixes of one model.

    Attributes:
        attachments: Each prefix by its name; all of one engine.
        active: Name of the one that calls are served with, and that trains.
        rows: What each row of a call names instead, inside :func:`prefixkit.rows`.
        disablers: How many :func:`prefixkit.disabled` blocks are under way.
        identity: Marks the state that travels beside a call.
        trained_before: ``requires_grad`` of every base parameter before the first ``apply``.
        base_head: The base's values of all heads, by parameter name.
        handles: Of the hooks.
        displaced: What the instance answered by itself before, where the prefix answers now.
        homes: Files whose attention functions the sites call.
        check: Whether it is time to look at gradients.
    """

    attachments: dict[str, Attachment] = field(default_factory=dict)
    active: str = ""
    rows: Rows | None = None
    disablers: int = 0
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    trained_before: dict[str, bool] = field(default_factory=dict)
    base_head: dict[str, torch.Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    displaced: dict[str, Any] = field(default_factory=dict)
    homes: tuple[str, ...] = ()
    check: GradientCheck = field(default_factory=GradientCheck)

    @property
    def enabled(self) -> bool:
        """False inside :func:`prefixkit.disabled`."""
        return not self.disablers

    @property
    def attachment(self) -> Attachment:
        """The active prefix."""
        return self.attachments[self.active]

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's stacks, each with the sites of every prefix."""
        return merged_stacks(self.attachments.values())

    def add(self, new: Attachment) -> None:
        """One more prefix, which becomes the active one.

        Raises:
            AttachmentError: If there is one of that name.
            ConfigError: If it cannot stand on one model with the others.
        """
        name = new.config.name
        if hasattr(nn.ModuleDict(), name):
            raise ConfigError(f"name is {name!r}, which torch's modules have as an attribute; pass another name=")
        if name in self.attachments:
            raise AttachmentError(
                f"this model already has a prefix {name!r}; pass another name=, or take that one off first, with "
                f"prefixkit.remove(model, name={name!r})"
            )
        if self.attachments:
            _check_joins(self.attachment, new)
        self.active = name
        self.attachments[name] = new

    def named(self, name: str | None) -> Attachment:
        """The prefix called ``name``; ``None``: the active one.

        Raises:
            AttachmentError: If there is none of that name.
        """
        if name is None:
            return self.attachment
        if name not in self.attachments:
            has = ", ".join(map(repr, self.attachments))
            raise AttachmentError(f"this model has no prefix {name!r}{closest(name, self.attachments)}; it has {has}")
        return self.attachments[name]

    def reading(self) -> PrefixState | None:
        """What takes keys and values while a stack reads the virtual tokens of one of the prefixes; else ``None``."""
        for one in self.attachments.values():
            state = reading_now(one)
            if state is not None:
                return state
        return None

    def served(self, arguments: dict[str, Any], kept: Kept | None) -> Attachment | Mixture:
        """What the call of a stack with ``arguments`` is served with."""
        if self.rows is None:
            return self.attachment
        batch, named = batch_of(arguments), self.rows
        return once(kept, ("mixture", batch), lambda: named.mixture(self, batch))

    def kept(self, cache: Any) -> Kept | None:
        """What earlier calls made for one that goes on from ``cache``, as :func:`prefixkit.kept.kept_for`."""
        used = [self.attachment] if self.rows is None else list(self.rows.used(self).values())
        rows = () if self.rows is None else self.rows.names
        return kept_for(cache, used, (rows, *(one.identity for one in used)))

    @property
    def puts_behind(self) -> bool:
        """Whether calls are served with an infix, which has to know where the text ends."""
        return self.rows is None and self.attachment.config.infix

    def flat(self) -> Any:
        """The flat prefix of the active one, or by name of those that rows have named."""
        return self.attachment.flat() if self.rows is None else self.rows.flats(self)

    def __getstate__(self) -> dict[str, Any]:
        """Inside ``disabled`` and ``rows`` the model is not itself, and a copy would never be again."""
        if not self.enabled or self.rows is not None:
            raise AttachmentError("copy or pickle the model outside of prefixkit.disabled and prefixkit.rows")
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a spawned process that unpickles the model, nothing stands before the attention functions yet."""
        self.__dict__.update(state)
        stand_before_attention(self.homes)


def find(model: nn.Module) -> Prefixes | None:
    """The prefixes of ``model``, if it has any."""
    prefixes: Prefixes | None = getattr(model, "__dict__", {}).get(KEY)  # what is no module has none
    return prefixes


def require(model: nn.Module) -> Prefixes:
    """The prefixes of ``model``.

    Raises:
        AttachmentError: If it has none.
    """
    prefixes = find(model)
    if prefixes is None:
        raise AttachmentError(f"this {type(model).__name__} has no prefix; {_where_one_is(model)}")
    return prefixes


def _where_one_is(model: object) -> str:
    """What to do about a model without a prefix: PEFT, DDP or torch.compile may have wrapped one that has it."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = next((f"{name!r}, a {type(module).__name__}" for name, module in modules if find(module)), None)
    return f"pass the model inside, {inside}" if inside else "call prefixkit.apply or prefixkit.load first"


def _check_joins(old: Attachment, new: Attachment) -> None:
    """Raise where they cannot stand on one model: with other engines, or adapters that say something else."""
    if type(new.engine) is not type(old.engine):
        raise ConfigError(
            f"prefix {new.config.name!r} has engine={new.engine.name!r}, and {old.config.name!r} on the same model "
            f"{old.engine.name!r}; all prefixes of a model have one engine"
        )
    frames = [[(one.name, one.path, one.hands_down, dict(one.turns)) for one in each.stacks] for each in (old, new)]
    sites = {site.place: site for site in old.layout.sites}
    if frames[0] != frames[1] or any(sites.get(site.place, site) != site for site in new.layout.sites):
        raise ConfigError(
            f"prefix {new.config.name!r} was made with another adapter than {old.config.name!r} on the same model"
        )


def install(model: PreTrainedModel, prefixes: Prefixes) -> None:
    """Put finished attachments on the bare model: all of them, or on an error nothing."""
    try:
        model.__dict__[KEY] = prefixes
        prefixes.trained_before = {name: value.requires_grad for name, value in model.named_parameters()}
        # A LoRA that is on the model trains together with the prefix.
        kept = [parameter for parameter in peft_parameters(model).values() if parameter.requires_grad]
        model.requires_grad_(False)
        for parameter in kept:
            parameter.requires_grad_(True)
        prefixes.base_head = {}
        for attachment in prefixes.attachments.values():
            _bring(model, prefixes, attachment)
        encoders = {name: one.encoder for name, one in prefixes.attachments.items()}
        model.add_module(MODULE, nn.ModuleDict(encoders))
        for attachment in prefixes.attachments.values():
            attachment.encoder.train(model.training)
        _wake(model, prefixes)
        engine = prefixes.attachment.engine
        prefixes.homes = engine.attach(model, prefixes.stacks, prefixes.attachment.state_key)
        add_hooks(model, prefixes)
    except BaseException:
        uninstall(model)
        raise


def _bring(model: nn.Module, prefixes: Prefixes, attachment: Attachment) -> None:
    """Note where an attachment is now, and what its head was in the base."""
    head = attachment.own_head(model)
    attachment.host, attachment.head_names = prefixes.identity, tuple(head)
    for name, value in head.items():
        prefixes.base_head.setdefault(name, value.detach().clone())
        attachment.kept_head.setdefault(name, value.detach().clone())
    if not attachment.shapes:
        attachment.note_shapes(model)
    if attachment.trained is None:
        own = {name for name, value in attachment.encoder.named_parameters() if value.requires_grad}
        attachment.trained = frozenset(own | {f"head.{name}" for name in head})


def uninstall(model: nn.Module) -> None:
    """Give back the very base. Safe on half-installed attachments, which stay what they are."""
    prefixes = require(model)
    while prefixes.handles:
        prefixes.handles.pop().remove()
    attachment = prefixes.attachment
    if attachment.trained is None:
        _sleep(model, prefixes)
    attachment.engine.detach(model, prefixes.stacks)
    model._modules.pop(MODULE, None)
    for name, value in model.named_parameters():
        value.requires_grad_(prefixes.trained_before.get(name, value.requires_grad))
        if not value.requires_grad:
            value.grad = None
    model.__dict__.pop(KEY, None)


def _wake(model: nn.Module, prefixes: Prefixes) -> None:
    """The active prefix serves and trains: its head is in the model."""
    attachment = prefixes.attachment
    put_head(model, prefixes)
    for name, value in attachment.parameters(model).items():
        value.requires_grad_(name in (attachment.trained or ()))
    attachment.trained = None


def _sleep(model: nn.Module, prefixes: Prefixes) -> None:
    """The active prefix neither serves nor trains: the base's head is in the model."""
    attachment = prefixes.attachment
    found = head_parameters(model, attachment.config.head)
    head = {name: value for name, value in found.items() if name in attachment.head_names}
    trains = {**dict(attachment.encoder.named_parameters()), **{f"head.{name}": value for name, value in head.items()}}
    attachment.trained = frozenset(name for name, value in trains.items() if value.requires_grad)
    for value in trains.values():
        value.requires_grad_(False)
    for value in head.values():
        value.grad = None  # of this prefix's head, and not of the next one's
    if tuple(found) == attachment.head_names and not attachment.kept_head:
        take_head(model, prefixes)


def switch(model: nn.Module, prefixes: Prefixes, name: str) -> None:
    """Have the prefix ``name`` serve and train, in place of the active one.

    Raises:
        AttachmentError: If the head of one of them is not what it was; nothing is changed then.
    """
    for one in (prefixes.attachment, prefixes.named(name)):
        check_head(model, prefixes, one)
    _sleep(model, prefixes)
    prefixes.active = name
    _wake(model, prefixes)


def check_head(model: nn.Module, prefixes: Prefixes, attachment: Attachment) -> None:
    """Raise if something has changed the head's parameters since, or their sizes.

    Raises:
        AttachmentError: If it has.
    """
    for name, value in attachment.own_head(model).items():
        aside = attachment.kept_head.get(name, prefixes.base_head.get(name))
        if aside is not None and aside.shape != value.shape:
            raise AttachmentError(
                f"{name!r} of the head is {tuple(value.shape)} now, and was {tuple(aside.shape)} when the prefix was "
                "applied; resize before that"
            )


def put_head(model: nn.Module, prefixes: Prefixes) -> None:
    """Exchange the base's values of the head for those of the active prefix.

    By ``.data``, so that a graph built before still finds its weights when they are back.
    """
    attachment = prefixes.attachment
    for name, value in attachment.own_head(model).items():
        value.data, prefixes.base_head[name] = like(attachment.kept_head.pop(name), value), value.data
    torch.clear_autocast_cache()  # it knows weights by their object, which stays


def take_head(model: nn.Module, prefixes: Prefixes) -> None:
    """Exchange the values of the active prefix's head for the base's."""
    attachment = prefixes.attachment
    for name, value in attachment.own_head(model).items():
        value.data, attachment.kept_head[name] = like(prefixes.base_head[name], value), value.data
    torch.clear_autocast_cache()


@contextmanager
def with_base_head(model: nn.Module, prefixes: Prefixes) -> Iterator[None]:
    """Inside, the model has the base's head and no prefix."""
    if prefixes.enabled:
        check_head(model, prefixes, prefixes.attachment)
        take_head(model, prefixes)
    prefixes.disablers += 1
    try:
        yield
    finally:
        prefixes.disablers -= 1
        if prefixes.enabled:
            put_head(model, prefixes)
