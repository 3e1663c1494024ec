"""Apply a prefix, look at it, switch it off, fold it, take it away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from prefixkit.adapter import Adapter, Site
from prefixkit.additions import GATE
from prefixkit.assembly import build, check_model, stacks_of
from prefixkit.attachment import MODULE
from prefixkit.discovery import installed
from prefixkit.errors import AttachmentError, ConfigError, EngineError
from prefixkit.frozen import add_frozen
from prefixkit.head import choose_head, tied_with
from prefixkit.initialisation import Init, initialise
from prefixkit.instance_calls import start_answering, stop_answering
from prefixkit.layout import Layout
from prefixkit.method import MEMORY, PREFIX, Method
from prefixkit.prefix_config import PrefixConfig
from prefixkit.prefix_encoder import PrefixEncoder, flat_encoder
from prefixkit.prefixes import Prefixes, check_head, find, install, require, switch, uninstall, with_base_head

Model = TypeVar("Model", bound=PreTrainedModel)


def apply(
    model: Model,
    method: str | Method = "p-tuning-v2",
    *,
    num_virtual_tokens: int,
    name: str = "default",
    adapter: Adapter | None = None,
    engine: str = "auto",
    positions: str = "shift",
    window: str = "pinned",
    init: Init = "auto",
    stacks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    layer_tokens: Mapping[int, int] | None = None,
    head: str | bool | Sequence[str] = "auto",
    gate: bool = False,
    infix: bool = False,
    num_frozen_tokens: int = 0,
    **method_options: Any,
) -> Model:
    """Give ``model`` a trainable prefix, in place, and freeze everything else (but a LoRA of PEFT that trains).

    Example::

        model = AutoModelForCausalLM.from_pretrained("path/or/name")
        prefixkit.apply(model, method="p-tuning-v2", num_virtual_tokens=20)
        Trainer(model=model, ...).train()

    Args:
        model: A transformers model. It keeps its class. Where no plugin serves its type, a few tiny
            forward passes tell where the prefix goes (:func:`prefixkit.generic_adapter`).
        method: ``"prefix-tuning"`` (an MLP parametrises the prefix, Li & Liang 2021),
            ``"p-tuning-v2"`` (the prefix is the parameter, Liu et al. 2022), another of the
            installed ones, or a :class:`Method` itself.
        num_virtual_tokens: Length P of the prefix.
        name: Name of the prefix, a Python identifier.
        adapter: Overrules the installed plugins.
        engine: ``"attention"``, ``"cache"``, or ``"auto"``: attention, and the cache where a model's attention
            cannot be reached.
        positions: ``"shift"``: the first real token stands at position P, as after a prompt of P
            tokens. ``"none"``: at position 0. A model whose positions cannot be moved has ``"none"``, and
            its config says so.
        window: ``"pinned"``: every query sees the prefix. ``"slide"``: in layers with a sliding
            window it slides out of sight like ordinary context.
        init: What the prefix starts with. ``"tokens"``: keys and values of random tokens, which the base reads
            once. ``"matched"``: random numbers with their mean and spread. ``"zeros"``. ``"random"``: as the
            method starts by itself, small. ``"auto"``: tokens where the model reads any, else random. A
            :class:`TextInit` or :class:`ChunksInit`: keys and values of a text. A transformers cache of one row,
            or the flat prefix itself, ``(P, width)``. A method with an MLP is fitted to it.
        stacks: Which of ``"encoder"``, ``"decoder"``, ``"cross"`` carry the prefix; all by default.
        layers: Which layers carry it, from 0; all by default.
        layer_tokens: By layer, how many virtual tokens it has, where that is fewer than ``num_virtual_tokens``:
            the last ones.
        head: ``"auto"``: a task class's new head trains and is saved with the prefix; ``False``:
            it stays frozen; a list of module names: those train.
        gate: Whether the prefix has a softmax of its own and a gate that starts shut, so that training starts at
            the base model, bit for bit. Needs ``positions="none"`` and the attention engine.
        infix: Whether the prefix stands between a text and its continuation, ``[x; PREFIX; y]``. Where y begins
            is told by ``labels`` in training, and is the last token of the prompt in ``generate``.
        num_frozen_tokens: How many of the first virtual tokens keep the keys and values they start with.
        **method_options: Options of the method: ``prefix_projection``, ``encoder_hidden_size``
            (512), ``prefix_dropout`` (0).

    Returns:
        The same object.

    Raises:
        UnknownAdapterError: If the plugin for the model's type failed to load.
        AdapterConflictError: If two distributions do.
        MethodError: For an unknown method or option.
        ConfigError: For an argument that cannot be served.
        EngineError: If the engine cannot honour the policies, or the model's attention
            implementation cannot be wrapped.
        AttachmentError: If the model already has a prefix.
        UnsupportedModelError: If the object is no transformers model, or lacks what its adapter names.

    On any error the model is as it was.
    """
    model_type = check_model(model)
    chosen = method if isinstance(method, Method) else installed().method(method)
    config = PrefixConfig(
        method=chosen.name,
        method_options=chosen.resolve(method_options),
        num_virtual_tokens=num_virtual_tokens,
        name=name,
        positions=positions,
        window=window,
        stacks=_listed("stacks", stacks, "names"),
        layers=_listed("layers", layers, "layer numbers"),
        layer_tokens=tuple(layer_tokens.items()) if layer_tokens else (),
        engine=engine,
        gate=gate,
        infix=infix,
        num_frozen_tokens=num_frozen_tokens,
        model_type=model_type,
        base_model_name_or_path=getattr(model.config, "_name_or_path", "") or "",
    )
    with changing(model) as prefixes:
        attachment = build(model, config, adapter, chosen)
        modules = choose_head(model, head, attachment.stacks)
        attachment.config = replace(attachment.config, head=modules, head_tied=tied_with(model, modules))
        initialise(model, attachment, init)
        prefixes.add(attachment)
    return model


@contextmanager
def changing(model: PreTrainedModel) -> Iterator[Prefixes]:
    """Inside, the model is the bare base; afterwards it has the prefixes that the block has left in what it was given.

    On any error it has those that it had.

    Raises:
        AttachmentError: Inside blocks in which the model is not itself.
    """
    with torch.inference_mode(False):  # what is made there never trains, without a word
        yield from _changing(model)


def _changing(model: PreTrainedModel) -> Iterator[Prefixes]:
    old = find(model)
    if old is None:
        new = Prefixes()
        yield new
        put_on(model, new)
        return
    check_outside(old)
    for one in old.attachments.values():
        check_head(model, old, one)
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    take_off(model)
    new = replace(old, attachments=dict(old.attachments))
    try:
        yield new
        put_on(model, new)
    except BaseException:
        put_on(model, old)
        raise
    finally:
        # Of the base, and of what others put into it; prefixes and heads know for themselves.
        own = {name for one in require(model).attachments.values() for name in one.head_names}
        for name, value in model.named_parameters():
            if name in trained and name not in own and not name.startswith(f"{MODULE}."):
                value.requires_grad_(trained[name])


def put_on(model: PreTrainedModel, prefixes: Prefixes) -> None:
    """Install the prefixes, and have the model answer the Trainer's calls for itself."""
    install(model, prefixes)
    start_answering(model)


def take_off(model: PreTrainedModel) -> None:
    """The inverse of :func:`put_on`."""
    stop_answering(model)
    uninstall(model)


def remove(model: Model, name: str | None = None) -> Model:
    """Take the prefix off: outputs, state-dict keys, configs and ``requires_grad`` are the base's again.

    Example::

        prefixkit.save(model, "my-prefix")
        prefixkit.remove(model)

    A head that trained goes back to the values it had before ``apply``; save first what you want
    to keep.

    Args:
        model: A model with prefixes.
        name: Of several prefixes, the one to take off, which must not be the active one; all by default.

    Raises:
        AttachmentError: If the model has no prefix, none of that name, or inside :func:`disabled`.
    """
    prefixes = require(model)
    check_outside(prefixes)
    attachment = prefixes.named(name)
    prefixes.attachment.own_head(model)
    if name is not None and len(prefixes.attachments) > 1:
        if attachment is prefixes.attachment:
            others = ", ".join(repr(other) for other in prefixes.attachments if other != name)
            raise AttachmentError(f"prefix {name!r} is active; activate another one first ({others})")
        with changing(model) as left:
            del left.attachments[name]
        return model
    take_off(model)
    return model


def check_outside(prefixes: Prefixes) -> None:
    """Raise inside blocks in which the model is not itself."""
    if not prefixes.enabled or prefixes.rows is not None:
        raise AttachmentError("add, activate and remove prefixes outside of prefixkit.disabled and prefixkit.rows")


def activate(model: Model, name: str) -> Model:
    """Have the prefix ``name`` serve every call, and train; the others are frozen and do nothing.

    Example::

        prefixkit.load(model, "summaries", name="summaries")
        prefixkit.load(model, "dialogue", name="dialogue")  # the last one loaded is active
        prefixkit.activate(model, "summaries")

    It trains if it did when it was active last. Its head is in the model; the others keep theirs.

    Raises:
        AttachmentError: If the model has no prefix of that name, or inside :func:`disabled` or :func:`rows`.
    """
    prefixes = require(model)
    check_outside(prefixes)
    prefixes.named(name)
    switch(model, prefixes, name)
    return model


def names(model: PreTrainedModel) -> list[str]:
    """The names of the model's prefixes, in the order in which they came; none for a bare model.

    Example::

        prefixkit.names(model)  # ["summaries", "dialogue"]; prefixkit.config(model).name is the active one
    """
    prefixes = find(model)
    return [] if prefixes is None else list(prefixes.attachments)


def unfreeze(model: Model, name: str | None = None) -> Model:
    """Have prefix and head train: again, after something else froze them, or for the first time after ``load``.

    Example::

        prefixkit.apply(model, num_virtual_tokens=20)
        model.add_adapter(LoraConfig(...))  # PEFT freezes all but its own
        prefixkit.unfreeze(model)

    Args:
        model: A model with prefixes.
        name: Which of them; the active one by default. Another one trains where rows name it
            (:func:`prefixkit.rows`), without its head.

    Raises:
        AttachmentError: If the model has no prefix, or none of that name.
    """
    prefixes = require(model)
    attachment = prefixes.named(name)
    attachment.encoder.requires_grad_(True)
    if attachment is prefixes.attachment:
        for value in attachment.own_head(model).values():
            value.requires_grad_(True)
    else:
        attachment.trained = frozenset(attachment.parameters(model))
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model gives the bare base's outputs, bit for bit, its old head included.

    Example::

        with torch.no_grad(), prefixkit.disabled(model):
            base_logits = model(**inputs).logits

    Raises:
        AttachmentError: If the model has no prefix.
    """
    with with_base_head(model, require(model)):
        yield model


def fold(model: Model) -> Model:
    """Replace the method's parameters by the flat prefix they give: exact, smaller, faster.

    Example::

        prefixkit.fold(model)
        prefixkit.save(model, "to-ship")

    An optimizer made before still holds the old parameters. A prefix that is flat already stays
    as it is.

    Raises:
        AttachmentError: If the model has no prefix.
        EngineError: If it is sharded or offloaded.
    """
    attachment = require(model).attachment
    if attachment.gives == MEMORY or (isinstance(attachment.encoder, PrefixEncoder) and attachment.encoder.is_flat):
        return model
    if attachment.is_sharded():
        raise EngineError("FSDP would not know the folded prefix; fold it before the model is sharded")
    with torch.no_grad():
        encoder = flat_encoder(attachment.flat_of(model))
    if attachment.config.gate:
        encoder.register_parameter(GATE, attachment.encoder.get_parameter(GATE))
    if attachment.config.num_frozen_tokens:
        add_frozen(encoder, attachment.config.num_frozen_tokens)
    trains = any(value.requires_grad for value in attachment.encoder.parameters())
    encoder.requires_grad_(trains).train(attachment.encoder.training)
    attachment.encoder, attachment.gives = encoder, PREFIX
    attachment.config = replace(attachment.config, folded=True)
    holder = model.get_submodule(MODULE)
    holder.add_module(attachment.config.name, encoder)
    attachment.note_shapes(model)
    return model


def sites(model: PreTrainedModel) -> list[Site]:
    """The sites of the model's prefix; of a bare model, all the sites its adapter names.

    Example::

        [(site.path, site.stack, site.kv_heads, site.key_dim) for site in prefixkit.sites(model)]

    Raises:
        UnknownAdapterError: If the model is bare and the plugin for its type failed to load.
        UnsupportedModelError: If it is no transformers model.
    """
    prefixes = find(model)
    if prefixes is not None:
        return list(prefixes.attachment.layout.sites)
    adapter = installed().adapter_for(check_model(model))
    return list(Layout(site for stack in stacks_of(model, adapter) for site in stack.sites).sites)


def config(model: PreTrainedModel, name: str | None = None) -> PrefixConfig:
    """What the model's prefix is: the active one, or that called ``name``.

    Example::

        prefixkit.config(model).num_virtual_tokens

    Raises:
        AttachmentError: If the model has no prefix, or none of that name.
    """
    return require(model).named(name).config


def _listed(field: str, values: Sequence[Any] | None, what: str) -> tuple[Any, ...] | None:
    if isinstance(values, str | int):
        raise ConfigError(f"{field} is {values!r}; pass a list of {what}")
    return None if values is None else tuple(values)
