"""Groups for an optimizer: the prefix, a new head and a LoRA want learning rates of their own."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from prefixkit.additions import GATE
from prefixkit.attachment import MODULE
from prefixkit.beside_peft import peft_parameters
from prefixkit.errors import AttachmentError, ConfigError, some
from prefixkit.head import choose_head
from prefixkit.learning_rate import recommended_lr, warn_of
from prefixkit.prefixes import require

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment
    from prefixkit.prefixes import Prefixes

NEW_RATE = 0.1
"""Of a new head and of a gate: what a linear probe was best at in the studies, and what they have at a flat prefix."""
SAVED_WHOLE = {"modules_to_save", "original_module"}
"""Parts of a module that PEFT trains and saves as it is, in names of parameters."""


def parameter_groups(
    model: PreTrainedModel, *, lr: float | None = None, head_lr: float | None = None, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """What trains, as groups for an optimizer of torch: prefix, head and anything else, each with its learning rate.

    A new head wants a far higher rate than an MLP that makes the prefix: at the MLP's it hardly learns. A gate has a
    group of its own too, at the 0.1 that it has beside a flat prefix.

    Example::

        optimizer = torch.optim.AdamW(prefixkit.parameter_groups(model), weight_decay=0.0)
        Trainer(model, arguments, optimizers=(optimizer, None), ...)  # Trainer makes the schedule

    Trainer does not look at ``learning_rate`` and ``weight_decay`` of its arguments then, and logs the rate of the
    first group. Under FSDP it refuses an optimizer that is passed; in a loop of your own, call this after sharding.

    Args:
        model: A model with a prefix: the one that was given to :func:`apply`, not what PEFT or DDP put around it.
        lr: Peak learning rate of the prefix; ``None``: :func:`recommended_lr` of each.
        head_lr: That of the head, the modules in ``prefixkit.config(model).head``; ``None``: 0.1, where the head is
            the new one of a task class.
        other_lr: That of what trains beside them, such as a LoRA of PEFT, wherever it is.

    Returns:
        Groups with ``"params"``, ``"lr"`` and a ``"name"``, in the order of prefixes (``"prefixkit.default"``, and
        ``"prefixkit.default.gate"``), ``"head"``, ``"other"``; without those that are empty.

    Raises:
        AttachmentError: If the model has no prefix, or none that trains.
        ConfigError: If a rate is not a finite number of 0 or more; if ``head_lr`` is given and no head trains, or not
            given and the head is not new; if something else trains and ``other_lr`` is not given.
        MethodError: If ``lr`` is not given and the method recommends none.

    Warns:
        UserWarning: As :func:`check_lr`, of ``lr``.
    """
    for argument, rate in (("lr", lr), ("head_lr", head_lr), ("other_lr", other_lr)):
        _check_rate(argument, rate)
    prefixes = require(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    own = _not_of_peft(model, trained)
    groups: list[dict[str, Any]] = []
    for attachment in prefixes.attachments.values():
        groups += _of_prefix(own, attachment, lr)
    if not groups:
        raise AttachmentError(
            "no prefix of this model trains; call prefixkit.unfreeze (PEFT freezes a prefix when it adds an adapter), "
            "or load it with trainable=True"
        )
    ids = set(map(id, prefixes.attachment.own_head(model).values()))
    head = [value for value in own.values() if id(value) in ids]
    groups += _group("head", head, _head_rate(model, prefixes, head_lr, trains=bool(head)))
    taken = {id(value) for group in groups for value in group["params"]}
    rest = {name: value for name, value in trained.items() if id(value) not in taken}
    if rest and other_lr is None:
        raise ConfigError(
            f"{some(rest)}: set to train, and neither prefix nor head; give a learning rate, other_lr=, or freeze them"
        )
    return groups + _group("other", list(rest.values()), other_lr)


def _of_prefix(trained: dict[str, nn.Parameter], attachment: Attachment, lr: float | None) -> list[dict[str, Any]]:
    """The groups of a prefix: its numbers, and its gate."""
    path = f"{MODULE}.{attachment.config.name}"
    own = {name: value for name, value in trained.items() if name.startswith(f"{path}.")}
    gate = own.pop(f"{path}.{GATE}", None)
    gates = _group(f"{path}.{GATE}", [] if gate is None else [gate], NEW_RATE)
    if not own:
        return gates
    if lr is None:
        lr = recommended_lr(attachment.config)
    else:
        warn_of(attachment.config, lr, stacklevel=4)
    return _group(path, list(own.values()), lr) + gates


def _group(name: str, params: list[nn.Parameter], rate: float | None) -> list[dict[str, Any]]:
    """A group of an optimizer, if there is anything in it."""
    return [{"params": params, "lr": rate, "name": name}] if params else []


def _head_rate(model: PreTrainedModel, prefixes: Prefixes, head_lr: float | None, *, trains: bool) -> float | None:
    """The rate of the head that trains, or does not.

    Raises:
        ConfigError: See :func:`parameter_groups`.
    """
    if not trains:
        if head_lr is not None:
            raise ConfigError(
                f"head_lr is {head_lr:g}, and no head trains with this prefix; apply(head=[...]) names one"
            )
        return None
    head = prefixes.attachment.config.head
    if head_lr is None and not set(head) <= set(choose_head(model, "auto", prefixes.stacks)):
        raise ConfigError(
            f"{some(head)}: a head of your own choice, which may not be new; give its learning rate, head_lr= "
            f"({NEW_RATE} suits one that starts at random)"
        )
    return NEW_RATE if head_lr is None else head_lr


def _not_of_peft(model: PreTrainedModel, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """``trained`` without LoRAs, which may be in a head or an MLP; a head that PEFT only saves is no LoRA."""
    theirs = {id(value) for name, value in peft_parameters(model).items() if not SAVED_WHOLE & set(name.split("."))}
    return {name: value for name, value in trained.items() if id(value) not in theirs}


def _check_rate(argument: str, rate: object) -> None:
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) < math.inf:
        raise ConfigError(f"{argument} is {rate!r}; a learning rate is a finite number of 0 or more")
