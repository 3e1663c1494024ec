"""The base model that a command names: its config, its class, and the model with or without its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefixkit.cli.wrong import CommandError
from prefixkit.errors import PrefixkitError, closest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "body": "AutoModel",
}
"""The classes that have a shorter name on the command line."""
OWN_CODE = "trust_remote_code"
"""In what transformers says where a model brings code of its own."""


def base_config(place: str, *, num_labels: int | None = None, revision: str | None = None) -> PretrainedConfig:
    """The config of a model.

    Raises:
        CommandError: If it cannot be had.
    """
    from transformers import AutoConfig

    labels = {} if num_labels is None else {"num_labels": num_labels}
    config: PretrainedConfig = having(
        place, lambda: AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False, **labels)
    )
    return config


def without_weights(config: PretrainedConfig, task: str | None) -> PreTrainedModel:
    """A model from its config alone.

    Raises:
        CommandError: If there is no such class, or none for this model.
    """
    from prefixkit.weightless import weightless

    kind = model_class(config, task)
    with _unfit(config, kind):
        return weightless(kind, config)


def with_weights(
    place: str, config: PretrainedConfig, task: str | None, needed: Collection[str] = ()
) -> PreTrainedModel:
    """The model itself, in float32; its weights have the parameters ``needed``.

    Raises:
        CommandError: If there is no such class, or its weights cannot be had.
    """
    import torch

    kind = model_class(config, task)
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, info = having(place, lambda: kind.from_pretrained(place, trust_remote_code=False, **settings))
    new = sorted(set(needed) & set(info["missing_keys"]))
    if new:
        raise CommandError(
            f"the weights of {place!r} have no {', '.join(new)}, which PEFT's file needs and the prefix did not train; "
            "pass the --task that the prefix was trained for"
        )
    made: PreTrainedModel = model
    return made


def tokenizer_of(place: str) -> Any:
    """The tokenizer that lies with a model.

    Raises:
        CommandError: If it cannot be had.
    """
    from transformers import AutoTokenizer

    return having(place, lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False))


def model_class(config: PretrainedConfig, task: str | None) -> Any:
    """The class that ``task`` names; without it, the one that the config names.

    Raises:
        CommandError: If transformers has none of that name.
    """
    import transformers

    if task is None:
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        usual = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        return next((kind for kind in named if kind is not None), usual)
    kind = getattr(transformers, TASKS.get(task, task), None)
    if not isinstance(kind, type) or not (hasattr(kind, "from_config") or hasattr(kind, "base_model_prefix")):
        raise CommandError(
            f"--task is {task!r}{closest(task, TASKS)}; possible: {', '.join(TASKS)}, or a model class of transformers"
        )
    return kind


def having(place: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, with the errors of transformers as one of ours."""
    try:
        return load()
    except (PrefixkitError, ImportError):
        raise
    # Files may be damaged in many ways, and transformers and its parts have an error for each.
    except Exception as error:
        if OWN_CODE in str(error):
            raise CommandError(f"{place!r} brings code of its own, which prefixkit never runs") from error
        reason = " ".join(str(error).split())
        raise CommandError(f"cannot load a model from {place!r}: {reason}") from error


@contextmanager
def _unfit(config: PretrainedConfig, kind: Any) -> Iterator[None]:
    try:
        yield
    # Configs may say anything, and models fail on it in as many ways.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if OWN_CODE in str(error):
            reason = "that is code of the model's own, which prefixkit never runs"
        raise CommandError(
            f"a model of type {config.model_type!r} cannot be made as {kind.__name__}: {reason}; pass another --task"
        ) from error
