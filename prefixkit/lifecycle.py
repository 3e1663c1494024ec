"""Apply a prefix, look at it, switch it off, fold it, take it away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixkit.adapter import Adapter, Site, Stack
from prefixkit.attachment import Attachment, find, install, require, swap_head, uninstall
from prefixkit.attention_engine import AttentionEngine
from prefixkit.cache_engine import CacheEngine
from prefixkit.discovery import GUIDE, installed
from prefixkit.errors import AttachmentError, ConfigError, MethodError, PluginError, UnsupportedModelError
from prefixkit.head import choose_head
from prefixkit.layout import Layout
from prefixkit.method import PrefixShape
from prefixkit.prefix_config import PrefixConfig
from prefixkit.prefix_encoder import PrefixEncoder, flat_encoder
from prefixkit.trainer_bridge import answer_for_trainer, stop_answering

Model = TypeVar("Model", bound=PreTrainedModel)


def apply(
    model: Model,
    method: str = "p-tuning-v2",
    *,
    num_virtual_tokens: int,
    name: str = "default",
    adapter: Adapter | None = None,
    engine: str = "auto",
    positions: str = "shift",
    window: str = "pinned",
    init: str | torch.Tensor = "random",
    stacks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    head: str | bool | Sequence[str] = "auto",
    **method_options: Any,
) -> Model:
    """Give ``model`` a trainable prefix, in place, and freeze everything else.

    Example::

        model = AutoModelForCausalLM.from_pretrained("path/or/name")
        prefixkit.apply(model, method="p-tuning-v2", num_virtual_tokens=20)
        Trainer(model=model, ...).train()

    Args:
        model: A transformers model of a type that a plugin serves. It keeps its class.
        method: ``"prefix-tuning"`` (an MLP parametrises the prefix, Li & Liang 2021),
            ``"p-tuning-v2"`` (the prefix is the parameter, Liu et al. 2022), or a plugin's.
        num_virtual_tokens: Length P of the prefix.
        name: Name of the prefix, a Python identifier.
        adapter: Overrules the installed plugins.
        engine: ``"attention"``, ``"cache"``, or ``"auto"``: attention.
        positions: ``"shift"``: the first real token stands at position P, as after a prompt of P
            tokens. ``"none"``: at position 0.
        window: ``"pinned"``: every query sees the prefix. ``"slide"``: in layers with a sliding
            window it slides out of sight like ordinary context.
        init: ``"random"``, or the flat prefix itself, ``(P, width)`` (methods without MLP).
        stacks: Which of ``"encoder"``, ``"decoder"``, ``"cross"`` carry the prefix; all by default.
        layers: Which layers carry it, from 0; all by default.
        head: ``"auto"``: a task class's new head trains and is saved with the prefix; ``False``:
            it stays frozen; a list of module names: those train.
        **method_options: Options of the method: ``prefix_projection``, ``encoder_hidden_size``
            (512), ``prefix_dropout`` (0).

    Returns:
        The same object.

    Raises:
        UnknownAdapterError: If no plugin serves the model's type.
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
    config = PrefixConfig(
        method=method,
        method_options=installed().method(method).resolve(method_options),
        num_virtual_tokens=num_virtual_tokens,
        name=name,
        positions=positions,
        window=window,
        stacks=_listed("stacks", stacks, "names"),
        layers=_listed("layers", layers, "layer numbers"),
        engine=engine,
        model_type=model_type,
        base_model_name_or_path=getattr(model.config, "_name_or_path", "") or "",
    )
    attachment = build(model, config, adapter)
    attachment.config = replace(
        attachment.config, head=choose_head(model, head, (site.path for site in attachment.layout.sites))
    )
    _initialise(attachment, init)
    put_on(model, attachment)
    return model


def check_model(model: object) -> str:
    """The model's type, if it is a model that can take a prefix now.

    Raises:
        UnsupportedModelError: If it is no transformers model.
        AttachmentError: If it has a prefix already.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers model, got {type(model).__name__}; pass the PreTrainedModel itself, "
            "before it is wrapped or compiled"
        )
    attachment = find(model)
    if attachment is not None:
        raise AttachmentError(
            f"this {type(model).__name__} already has a prefix, {attachment.config.name!r}; a model takes one at a "
            "time: call prefixkit.remove(model) first"
        )
    return str(model.config.model_type)


def build(model: PreTrainedModel, config: PrefixConfig, adapter: Adapter | None) -> Attachment:
    """A finished attachment for ``config``, not yet on the model, which stays as it is."""
    adapter = adapter or installed().adapter_for(config.model_type)
    stacks = _select(model, _stacks(model, adapter), config)
    layout = Layout(site for stack in stacks for site in stack.sites)
    shape = PrefixShape(
        num_virtual_tokens=config.num_virtual_tokens,
        width=layout.width,
        hidden_size=model.config.get_text_config().hidden_size,
    )
    attachment = Attachment(
        config=replace(config, sites=layout.sites),
        stacks=stacks,
        layout=layout,
        encoder=_encoder(config, shape).to(model.device),
        engine=CacheEngine() if config.engine == "cache" else AttentionEngine(),
    )
    attachment.engine.check(model, attachment)
    return attachment


def put_on(model: PreTrainedModel, attachment: Attachment) -> None:
    """Install the attachment, and have the model answer the Trainer's calls for itself."""
    install(model, attachment)
    answer_for_trainer(model)


def remove(model: Model) -> Model:
    """Take the prefix off: outputs, state-dict keys, configs and ``requires_grad`` are the base's again.

    A head that trained goes back to the values it had before ``apply``; save first what you want
    to keep.

    Raises:
        AttachmentError: If the model has no prefix.
    """
    attachment = require(model)
    stop_answering(model)
    uninstall(model, attachment)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the block the model gives the bare base's outputs, bit for bit, its old head included.

    Raises:
        AttachmentError: If the model has no prefix.
    """
    attachment = require(model)
    if not attachment.enabled:
        yield model
        return
    attachment.enabled = False
    swap_head(model, attachment)
    try:
        yield model
    finally:
        swap_head(model, attachment)
        attachment.enabled = True


def fold(model: Model) -> Model:
    """Replace the method's parameters by the flat prefix they give: exact, smaller, faster.

    An optimizer made before still holds the old parameters. A prefix that is flat already stays
    as it is.

    Raises:
        AttachmentError: If the model has no prefix.
    """
    attachment = require(model)
    if isinstance(attachment.encoder, PrefixEncoder) and attachment.encoder.transform is None:
        return model
    with torch.no_grad():
        encoder = flat_encoder(attachment.encoder())
    trains = any(value.requires_grad for value in attachment.encoder.parameters())
    encoder.requires_grad_(trains).train(attachment.encoder.training)
    attachment.encoder = encoder
    attachment.config = replace(attachment.config, folded=True)
    holder = model.get_submodule("prefixkit")
    holder.add_module(attachment.config.name, encoder)
    return model


def sites(model: PreTrainedModel) -> list[Site]:
    """The sites of the model's prefix; of a bare model, all the sites its adapter names.

    Raises:
        UnknownAdapterError: If the model is bare and no plugin serves its type.
        UnsupportedModelError: If it is no transformers model.
    """
    attachment = find(model) if isinstance(model, nn.Module) else None
    if attachment is not None:
        return list(attachment.layout.sites)
    adapter = installed().adapter_for(check_model(model))
    return list(Layout(site for stack in _stacks(model, adapter) for site in stack.sites).sites)


def config(model: PreTrainedModel) -> PrefixConfig:
    """What the model's prefix is.

    Raises:
        AttachmentError: If the model has no prefix.
    """
    return require(model).config


def _listed(field: str, values: Sequence[Any] | None, what: str) -> tuple[Any, ...] | None:
    if isinstance(values, str | int):
        raise ConfigError(f"{field} is {values!r}; pass a list of {what}")
    return None if values is None else tuple(values)


def _encoder(config: PrefixConfig, shape: PrefixShape) -> nn.Module:
    if config.folded:
        return flat_encoder(torch.zeros(shape.num_virtual_tokens, shape.width))
    return installed().method(config.method).build(shape, config.method_options)


def _stacks(model: PreTrainedModel, adapter: Adapter) -> list[Stack]:
    """The adapter's stacks, checked against the modules of the model."""
    stacks = list(adapter.stacks(model))
    if not any(stack.sites for stack in stacks):
        raise UnsupportedModelError(
            f"the adapter for {model.config.model_type!r} finds no attention in this {type(model).__name__}; see {GUIDE}"
        )
    names = {name for name, _ in model.named_modules()}
    for path in [path for stack in stacks for path in (stack.path, *(site.path for site in stack.sites))]:
        if path not in names:
            raise PluginError(f"the adapter for {model.config.model_type!r} names {path!r}, which {type(model).__name__} lacks")
    return stacks


def _select(model: PreTrainedModel, stacks: list[Stack], config: PrefixConfig) -> tuple[Stack, ...]:
    """The stacks with only the sites that ``stacks=`` and ``layers=`` ask for.

    One that keeps none still counts its positions from the mask, so that a left-padded row equals
    the row alone.
    """
    every = [site for stack in stacks for site in stack.sites]
    _check_asked("stacks", config.stacks, {site.stack for site in every}, model)
    _check_asked("layers", config.layers, {site.layer for site in every}, model)
    chosen = tuple(
        replace(stack, sites=tuple(site for site in stack.sites if _asked(site, config))) for stack in stacks
    )
    if not any(stack.sites for stack in chosen):
        raise ConfigError(f"stacks={config.stacks} and layers={config.layers} leave no attention of {type(model).__name__}")
    return chosen


def _asked(site: Site, config: PrefixConfig) -> bool:
    by_stack = config.stacks is None or site.stack in config.stacks
    return by_stack and (config.layers is None or site.layer in config.layers)


def _check_asked(field: str, asked: Iterable[Any] | None, present: set[Any], model: nn.Module) -> None:
    missing = [value for value in asked or () if value not in present]
    if missing or (asked is not None and not tuple(asked)):
        raise ConfigError(
            f"{field} asks for {missing or 'nothing'}, and {type(model).__name__} has {', '.join(map(str, sorted(present)))}"
        )


def _initialise(attachment: Attachment, init: str | torch.Tensor) -> None:
    if isinstance(init, str):
        if init != "random":
            raise ConfigError(f"init is {init!r}; possible: 'random', or a tensor with the flat prefix")
        return
    encoder = attachment.encoder
    if not isinstance(encoder, PrefixEncoder) or encoder.transform is not None:
        raise MethodError(
            f"method {attachment.config.method!r} computes its prefix through an MLP and cannot start from a given "
            "one; use method='p-tuning-v2'"
        )
    expected = (attachment.config.num_virtual_tokens, attachment.layout.width)
    if tuple(init.shape) != expected:
        raise ConfigError(f"init is {tuple(init.shape)}; the flat prefix of this model is {expected}")
    with torch.no_grad():
        encoder.embedding.weight.copy_(init)
