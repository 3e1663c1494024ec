"""Save a prefix and load it: the prefix and the head that trained with it, nothing of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from prefixkit import checkpoint_files, hub
from prefixkit.adapter import Adapter, Site
from prefixkit.assembly import build, check_model
from prefixkit.attachment import Attachment
from prefixkit.errors import CheckpointError, ConfigError, HeadError, MethodError, closest
from prefixkit.formats import detection, peft_export
from prefixkit.head import choose_head, tied_with
from prefixkit.lifecycle import changing
from prefixkit.method import Method
from prefixkit.prefix_config import PrefixConfig
from prefixkit.prefixes import require

Model = TypeVar("Model", bound=PreTrainedModel)
OWN, PEFT = FORMATS = ("prefixkit", "peft")
"""What :func:`save` can write."""


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: str = OWN,  # noqa: A002 - the field's own word
) -> None:
    """Write the model's prefix, and its head if that trained, to ``directory``.

    Example::

        prefixkit.save(model, "my-prefix")

    Writes ``prefix_config.json`` and ``prefix.safetensors``. With an MLP its weights are kept, so
    that training can go on; :func:`prefixkit.fold` first for the smallest file. A crash leaves the
    old checkpoint or the new one. Where processes share the model (FSDP2, tensor parallel, ZeRO-3) every one has
    to call, and the first one writes.

    Args:
        model: A model with a prefix.
        directory: The folder; it is made if need be.
        name: Of several prefixes, which; the active one by default.
        format: ``"prefixkit"``, or ``"peft"``: what ``PeftModel.from_pretrained`` loads, with equal logits. PEFT
            has no MLP in its files, so the prefix is folded there; the model keeps its own.

    Raises:
        AttachmentError: If the model has no prefix, or none of that name.
        CheckpointError: If ``directory`` is a file, the prefix is offloaded, or PEFT cannot express it.
        ConfigError: For another format.
    """
    attachment = require(model).named(name)
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}{closest(format, FORMATS)}; possible: {', '.join(FORMATS)}")
    if format == PEFT:
        # Refuses what is offloaded or in pieces, as for our own.
        attachment.whole_tensors(model)
        peft_export.write(model, attachment, Path(directory))
        return
    tensors = attachment.whole_tensors(model)
    if attachment.writes(model):
        checkpoint_files.write(Path(directory), attachment.config, tensors)


def load(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    trainable: bool = False,
    name: str | None = None,
    adapter: Adapter | None = None,
    method: Method | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Model:
    """Put a saved prefix on ``model``, in place, and freeze everything else.

    Prefixes of PEFT, AdapterHub, the 2021 code of prefix tuning, P-tuning v2 and Cartridges are loaded too.

    Example::

        model = AutoModelForCausalLM.from_pretrained("path/or/name")
        prefixkit.load(model, "my-prefix")  # or trainable=True, to train on
        prefixkit.load(model, "user/my-prefix")  # from the Hugging Face Hub, if there is no such folder here

    Args:
        model: A model of the architecture that the prefix was trained for. Prefixes that it has already stay; the
            one that is loaded becomes the active one.
        directory: Where :func:`prefixkit.save`, a ``Trainer`` or another library wrote it; of other libraries'
            files of tensors, also the path of the file. Or a repository of the Hugging Face Hub with its owner, of
            which the few files of a prefix are downloaded; what is there by that name wins.
        trainable: Whether prefix (with its MLP) and head train on; else all is frozen.
        name: What to call it here, if not as it was called when it was saved.
        adapter: Overrules the installed plugins.
        method: Overrules them too; it must have the name that is stored.
        revision: Branch, tag or commit of the repository; the main branch by default.
        token: For the hub; by default the one you have logged in with.

    Returns:
        The same object.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or for another architecture or shape, or the hub
            cannot be reached.
        AttachmentError: If the model already has a prefix of that name.
        UnknownAdapterError: If the plugin for the model's type failed to load.
        EngineError: If the stored policies cannot be honoured here.

    On any error the model is as it was. Pickles of other libraries are read for their tensors alone, and none of
    their code is ever run.
    """
    check_model(model)
    folder = hub.local_copy(directory, revision=revision, token=token)
    with changing(model) as prefixes:
        stored = detection.find(folder, model, adapter) or checkpoint_files.OwnCheckpoint(folder)
        config = stored.config if name is None else replace(stored.config, name=name)
        _check_kind(config, model, method, folder)
        attachment = _build(model, config, adapter, method, folder)
        _check_tied(config, model, folder)
        _check_sites(config.sites, attachment.layout.sites, folder)
        _check_shapes(stored.shapes(), attachment, model, folder)
        _fill(attachment, stored.tensors())
        prefixes.add(attachment)
    if not trainable:
        model.requires_grad_(False)
    return model


def _check_kind(config: PrefixConfig, model: PreTrainedModel, method: Method | None, folder: Path) -> None:
    model_type = str(model.config.model_type)
    if config.model_type != model_type:
        raise CheckpointError(
            f"the prefix in {str(folder)!r} is for model type {config.model_type!r}; "
            f"this {type(model).__name__} is {model_type!r}"
        )
    if method is not None and method.name != config.method:
        raise CheckpointError(f"the prefix in {str(folder)!r} is of method {config.method!r}, not of {method.name!r}")


def _build(
    model: PreTrainedModel, config: PrefixConfig, adapter: Adapter | None, method: Method | None, folder: Path
) -> Attachment:
    unfit = f"the prefix in {str(folder)!r} does not fit this {type(model).__name__}"
    try:
        choose_head(model, list(config.head), ())
    except ConfigError as error:
        raise HeadError(f"{unfit}: {error}") from error
    try:
        return build(model, config, adapter, method)
    # A RuntimeError is what torch raises for a size that no memory holds.
    except (ConfigError, MethodError, RuntimeError) as error:
        raise CheckpointError(f"{unfit}: {error}") from error


def _check_tied(config: PrefixConfig, model: PreTrainedModel, folder: Path) -> None:
    """What trained as one weight is one here too, and what trained apart is apart."""
    here = tied_with(model, config.head)
    if config.head_tied is not None and set(config.head_tied) != set(here):
        saved, now = (", ".join(names) or "nothing" for names in (config.head_tied, here))
        raise CheckpointError(
            f"the head {', '.join(config.head)} of the prefix in {str(folder)!r} was tied with {saved} when it "
            f"trained, and is tied with {now} in this model; make the model with the same tie_word_embeddings"
        )


def _check_sites(saved: tuple[Site, ...], here: tuple[Site, ...], folder: Path) -> None:
    """Same places, shapes and windows. Paths may differ: a task class nests its body deeper."""
    if len(saved) != len(here):
        raise CheckpointError(f"the prefix in {str(folder)!r} has {len(saved)} sites; this model has {len(here)}")
    for old, new in zip(saved, here, strict=True):
        if astuple(old)[1:] != astuple(new)[1:]:
            raise CheckpointError(f"the prefix in {str(folder)!r} was trained for {old}; this model has {new}")


def _check_shapes(
    saved: Mapping[str, tuple[int, ...]], attachment: Attachment, model: PreTrainedModel, folder: Path
) -> None:
    expected = {name: tuple(value.shape) for name, value in attachment.tensors(model).items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            kind = HeadError if name.startswith("head.") else CheckpointError
            raise kind(
                f"tensor {name!r} in {str(folder)!r} is {saved.get(name, 'missing')}; "
                f"this model needs {expected.get(name, 'no such tensor')}"
            )


def _fill(attachment: Attachment, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an attachment, not yet on a model, the numbers of a checkpoint."""
    own = {**dict(attachment.encoder.named_parameters()), **dict(attachment.encoder.named_buffers())}
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)
            else:
                # With memory of its own: numbers in the middle of a file may lie where kernels sum in another order.
                attachment.kept_head[name.removeprefix("head.")] = value.clone()
