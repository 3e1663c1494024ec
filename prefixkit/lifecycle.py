"""Apply a prefix, look at it, switch it off, fold it, take it away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixkit.adapter import Adapter, Site
from prefixkit.additions import GATE
from prefixkit.assembly import build, check_model, stacks_of
from prefixkit.attachment import MODULE, Attachment, find, install, own_head, require, swap_head, uninstall
from prefixkit.discovery import installed
from prefixkit.errors import AttachmentError, ConfigError, EngineError
from prefixkit.frozen import add_frozen
from prefixkit.head import choose_head
from prefixkit.initialisation import Init, initialise
from prefixkit.instance_calls import start_answering, stop_answering
from prefixkit.layout import Layout
from prefixkit.method import MEMORY, PREFIX, Method
from prefixkit.prefix_config import PrefixConfig
from prefixkit.prefix_encoder import PrefixEncoder, flat_encoder

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
    attachment = build(model, config, adapter, chosen)
    attachment.config = replace(attachment.config, head=choose_head(model, head, attachment.stacks))
    initialise(model, attachment, init)
    put_on(model, attachment)
    return model


def put_on(model: PreTrainedModel, attachment: Attachment) -> None:
    """Install the attachment, and have the model answer the Trainer's calls for itself."""
    install(model, attachment)
    start_answering(model)


def remove(model: Model) -> Model:
    """Take the prefix off: outputs, state-dict keys, configs and ``requires_grad`` are the base's again.

    Example::

        prefixkit.save(model, "my-prefix")
        prefixkit.remove(model)

    A head that trained goes back to the values it had before ``apply``; save first what you want
    to keep.

    Raises:
        AttachmentError: If the model has no prefix, or inside :func:`disabled`.
    """
    attachment = require(model)
    if not attachment.enabled:
        raise AttachmentError("remove the prefix outside of prefixkit.disabled")
    own_head(model, attachment)
    stop_answering(model)
    uninstall(model, attachment)
    return model


def unfreeze(model: Model) -> Model:
    """Have prefix and head train: again, after something else froze them, or for the first time after ``load``.

    Example::

        prefixkit.apply(model, num_virtual_tokens=20)
        model.add_adapter(LoraConfig(...))  # PEFT freezes all but its own
        prefixkit.unfreeze(model)

    Raises:
        AttachmentError: If the model has no prefix.
    """
    attachment = require(model)
    attachment.encoder.requires_grad_(True)
    for value in own_head(model, attachment).values():
        value.requires_grad_(True)
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
    attachment = require(model)
    if attachment.enabled:
        swap_head(model, attachment)
    attachment.disablers += 1
    try:
        yield model
    finally:
        attachment.disablers -= 1
        if attachment.enabled:
            swap_head(model, attachment)


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
    attachment = require(model)
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
    attachment = find(model) if isinstance(model, nn.Module) else None
    if attachment is not None:
        return list(attachment.layout.sites)
    adapter = installed().adapter_for(check_model(model))
    return list(Layout(site for stack in stacks_of(model, adapter) for site in stack.sites).sites)


def config(model: PreTrainedModel) -> PrefixConfig:
    """What the model's prefix is.

    Example::

        prefixkit.config(model).num_virtual_tokens

    Raises:
        AttachmentError: If the model has no prefix.
    """
    return require(model).config


def _listed(field: str, values: Sequence[Any] | None, what: str) -> tuple[Any, ...] | None:
    if isinstance(values, str | int):
        raise ConfigError(f"{field} is {values!r}; pass a list of {what}")
    return None if values is None else tuple(values)
