"""Calls that a model with a prefix answers itself, for an untouched ``Trainer`` and in batched serving.

``Trainer`` saves with ``model.save_pretrained`` and resumes from a file ``model.safetensors``
through ``model.load_state_dict``. While a prefix is attached the instance answers both calls
itself, so that a training checkpoint holds the prefix and the head, and no base weights. Continuous batching is
checked, since it would lose some prefixes without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from prefixkit import checkpoint_files, transformers_internals as internals
from prefixkit.attachment import MODULE
from prefixkit.beside_peft import has_peft_layers, peft_parameters
from prefixkit.cache_engine import CacheEngine
from prefixkit.continuous_batching import WAYS_IN, ContinuousBatching
from prefixkit.errors import CheckpointError, EngineError
from prefixkit.infix import GenerateBehind
from prefixkit.own_generate import OwnGenerate
from prefixkit.prefixes import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESUME_FILE = "model.safetensors"
"""The name ``Trainer`` looks for; its keys are those of the model's state dict."""


class SavePretrained:
    """Stands in for ``model.save_pretrained``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save prefix and head, with a copy under the name that ``Trainer`` resumes from; upload them if asked to."""
        attachment = require(self.model).attachment
        if state_dict is None:
            tensors = attachment.whole_tensors(self.model)
            is_main_process = is_main_process and attachment.writes(self.model)
        else:  # gathered by the caller, where parameters are sharded
            names = attachment.tensors(self.model) if is_main_process else ()
            tensors = {name: state_dict[attachment.state_name(name)] for name in names}
            attachment.check_whole(tensors)
        if not is_main_process:
            return
        directory = Path(save_directory)
        _refuse_to_overwrite_a_model(directory)
        self._save_adapters(directory)
        checkpoint_files.write(directory, attachment.config, tensors)
        named = {attachment.state_name(name): value for name, value in tensors.items()}
        named |= {name: value.detach() for name, value in peft_parameters(self.model).items()}
        checkpoint_files.write_tensors(directory / RESUME_FILE, named, {checkpoint_files.HEADER: "a copy for Trainer"})
        if push_to_hub:
            from prefixkit.publishing import publish  # needs prefixes, which need this module

            repo_id = options.pop("repo_id", None) or directory.resolve().name
            publish(self.model, attachment, tensors, repo_id, **_known(options))

    def _save_adapters(self, directory: Path) -> None:
        """Adapters of ``model.add_adapter``, in PEFT's own format and as transformers saves them."""
        if not has_peft_layers(self.model):
            return
        if not getattr(self.model, "_hf_peft_config_loaded", False):
            raise CheckpointError(
                "this model is inside a PeftModel, and save_pretrained of the model would lose what is PEFT's; save "
                "each apart: the prefix with prefixkit.save, the rest with the PeftModel's save_pretrained"
            )
        type(self.model).save_pretrained(self.model, directory)


class PushToHub:
    """Stands in for ``model.push_to_hub``, which would upload the copy for ``Trainer`` and a card that says nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, repo_id: str, **options: Any) -> str:
        """As :func:`prefixkit.push_to_hub`."""
        from prefixkit.publishing import push_to_hub

        return push_to_hub(self.model, repo_id, **_known(options))


HUB_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr")


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the many options of these calls in transformers, those that mean something for a prefix."""
    return {name: value for name, value in options.items() if name in HUB_OPTIONS}


def _refuse_to_overwrite_a_model(directory: Path) -> None:
    """``model.safetensors`` may be somebody's base weights: replace none that we did not write."""
    weights = directory / RESUME_FILE
    ours = not weights.exists() or checkpoint_files.written_by_prefixkit(weights)
    if not ours or (directory / "config.json").exists():
        raise CheckpointError(
            f"{str(directory)!r} holds a model of its own, whose weights save_pretrained would overwrite with the "
            "prefix; name another folder"
        )


class LoadStateDict:
    """Stands in for ``model.load_state_dict``: base weights are not missed where none are expected."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """As the method of the class; without ``strict`` only prefix and head can be missing."""
        attachment = require(self.model).attachment
        given = {key.split(".")[1] for key in state_dict if key.startswith(f"{MODULE}.")}
        if given and attachment.config.name not in given:
            theirs = ", ".join(map(repr, sorted(given)))
            raise CheckpointError(
                f"these are the numbers of prefix {theirs}, and {attachment.config.name!r} is active; activate the one "
                "that they belong to"
            )
        method = type(self.model).load_state_dict
        missing, unexpected = method(self.model, state_dict, strict=strict, assign=assign)
        ours = {attachment.state_name(name) for name in attachment.tensors(self.model)}
        ours |= peft_parameters(self.model).keys()
        return _IncompatibleKeys([name for name in missing if name in ours], unexpected)


class Generate(OwnGenerate):
    """Stands in for ``model.generate`` with the cache engine, whose virtual tokens stand in the cache."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class; a cache that an earlier call returned is refused."""
        cache = internals.cache_among(kwargs)
        if require(self.model).enabled and internals.held_prefix(cache) is not None:
            raise EngineError(
                "a cache that holds a prefix, from generate() or to_cache(), cannot start generate() with the cache "
                "engine, since generate() counts its virtual tokens as text; use engine='attention'"
            )
        return self.original()(*args, **kwargs)


def start_answering(model: PreTrainedModel) -> None:
    """Have this instance answer the calls of this module itself, and remember what it answered before."""
    prefixes = require(model)
    attachments = prefixes.attachments.values()
    answers: dict[str, Any] = {name: ContinuousBatching(model, prefixes, name) for name in WAYS_IN}
    answers |= {"save_pretrained": SavePretrained(model), "load_state_dict": LoadStateDict(model)}
    answers["push_to_hub"] = PushToHub(model)
    if isinstance(prefixes.attachment.engine, CacheEngine) and model.can_generate():
        answers["generate"] = Generate(model)
    if any(one.config.infix for one in attachments) and model.can_generate():
        answers["generate"] = GenerateBehind(model, prefixes)
    prefixes.displaced = {}
    for name, answer in answers.items():
        if name in model.__dict__:
            prefixes.displaced[name] = model.__dict__[name]
        model.__dict__[name] = answer


def stop_answering(model: PreTrainedModel) -> None:
    """Give the calls back to the class, or to what the instance had of its own."""
    answers = (SavePretrained, LoadStateDict, PushToHub, Generate, GenerateBehind, ContinuousBatching)
    for name in [name for name, value in model.__dict__.items() if isinstance(value, answers)]:
        del model.__dict__[name]
    model.__dict__.update(require(model).displaced)
