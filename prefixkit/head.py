"""Which modules of a task model are its head: new for the task, so they train with the prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prefixkit.errors import ConfigError, closest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from prefixkit.adapter import Stack

TASKS_WITH_NEW_HEAD = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForEntityClassification",
    "ForEntityPairClassification",
    "ForEntitySpanClassification",
    "ForQuestionAnswering",
    "ForQuestionAnsweringSimple",
    "ForMultipleChoice",
    "ForImageClassification",
    "ForAudioClassification",
)


def choose_head(model: PreTrainedModel, head: str | bool | Sequence[str], stacks: Iterable[Stack]) -> tuple[str, ...]:
    """Names of the modules that train with the prefix.

    Args:
        model: The model.
        head: ``"auto"``: the head of a task class, never a language-model head; ``False``: none;
            or names of modules or parameters, taken literally.
        stacks: The model's stacks, which tell the body from the head.

    Raises:
        ConfigError: If a name is no module of the model, or ``head`` is something else.
    """
    if head is False:
        return ()
    if head == "auto":
        return _automatic(model, stacks)
    if isinstance(head, str | bool) or not all(isinstance(name, str) for name in head):
        raise ConfigError(f"head is {head!r}; possible: 'auto', False, or a list of names of modules or parameters")
    parameters = model.named_parameters(remove_duplicate=False)
    names = {name for named in (model.named_modules(), parameters) for name, _ in named if name}
    for name in head:
        if name not in names:
            raise ConfigError(f"head names {name!r}, which {type(model).__name__} does not have{closest(name, names)}")
    return tuple(head)


def head_parameters(model: nn.Module, head: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of the head's modules by their name in the model, tied ones once."""
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)  # a tied head has its own name too
        if any(name == part or name.startswith(f"{part}.") for part in head)
    ]
    first = {id(parameter): name for name, parameter in reversed(named)}
    return {name: parameter for name, parameter in named if first[id(parameter)] == name}


def tied_with(model: nn.Module, head: Iterable[str]) -> tuple[str, ...]:
    """Parameters of the rest of the model that are one with parameters of the head, by name."""
    own = head_parameters(model, head)
    shared = {id(parameter) for parameter in own.values()}
    return tuple(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in shared and name not in own
    )


def _automatic(model: PreTrainedModel, stacks: Iterable[Stack]) -> tuple[str, ...]:
    classes = [cls.__name__ for cls in type(model).__mro__]
    if not any(name.endswith(TASKS_WITH_NEW_HEAD) for name in classes):
        return ()
    body = {stack.path.split(".")[0] for stack in stacks}
    embeddings = input_embeddings(model)
    modules = [
        name
        for name, child in model.named_children()
        if name not in body and child is not embeddings and any(True for _ in child.parameters())
    ]
    # Some heads are bare parameters of the task model itself.
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return (*modules, *own)


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The model's token embeddings; a model of sound or images may have none."""
    try:
        embeddings: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings
