"""Learning rates: a flat prefix and an MLP want ones that are a hundred times apart, and a new head wants its own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from prefixkit.attachment import MODULE
from prefixkit.discovery import installed
from prefixkit.errors import AttachmentError, ConfigError, MethodError
from prefixkit.prefixes import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.prefix_config import PrefixConfig

FAR = 10
"""By which factor a learning rate may differ from the recommended one without a warning."""
SHOWN = 3
"""So many names in a message."""
HEAD_RATE = 0.1
"""Of a new head: what a linear probe was best at in the studies, and what the head of a flat prefix has."""


def recommended_lr(config: PrefixConfig) -> float:
    """The peak learning rate to begin with, for Adam or AdamW with a short warm-up and a schedule that falls.

    Found by sweeps on E2E (a small decoder) and SNIPS (a small encoder); see the studies of the documentation.

    Example::

        TrainingArguments(..., learning_rate=prefixkit.recommended_lr(prefixkit.config(model)))

    Raises:
        MethodError: If the method is not installed, or recommends none.
    """
    name = "p-tuning-v2" if config.folded else config.method
    method = installed().method(name)
    if method.learning_rate is None:
        raise MethodError(f"method {name!r} recommends no learning rate; sweep one, from 0.001 to 0.1")
    options = method.options if config.folded else config.method_options
    return method.learning_rate(options)


def check_lr(config: PrefixConfig, learning_rate: float) -> None:
    """Warn of a learning rate that is more than ten times off the recommended one.

    Warns:
        UserWarning: With both numbers.
    """
    recommended = recommended_lr(config)
    if not recommended / FAR <= learning_rate <= recommended * FAR:
        warnings.warn(
            f"learning rate {learning_rate:g} is far from the {recommended:g} that suits method {config.method!r} as "
            "it is parametrised here: a flat prefix wants a rate about a hundred times an MLP's",
            stacklevel=2,
        )


def parameter_groups(
    model: PreTrainedModel, *, lr: float | None = None, head_lr: float = HEAD_RATE, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """What trains, as groups for an optimizer of torch: prefix, head and anything else, each with its learning rate.

    A head is new, so it wants a far higher rate than an MLP that makes the prefix: at the MLP's it hardly learns.

    Example::

        optimizer = torch.optim.AdamW(prefixkit.parameter_groups(model), weight_decay=0.0)
        Trainer(model, arguments, optimizers=(optimizer, None), ...)  # Trainer makes the schedule

    Args:
        model: A model with a prefix.
        lr: Peak learning rate of the prefix; ``None``: :func:`recommended_lr` of each.
        head_lr: That of the head, the modules in ``prefixkit.config(model).head``.
        other_lr: That of what trains beside them, such as a LoRA of PEFT.

    Returns:
        Groups with ``"params"`` and ``"lr"``, in the order prefixes, head, other; without those that are empty.

    Raises:
        AttachmentError: If the model has no prefix, or nothing of it trains.
        ConfigError: If something else trains and ``other_lr`` is not given.
        MethodError: If ``lr`` is not given and the method recommends none.

    Warns:
        UserWarning: As :func:`check_lr`, of ``lr``.
    """
    prefixes = require(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not trained:
        raise AttachmentError("nothing of this model trains; call prefixkit.unfreeze, or load with trainable=True")
    groups = []
    for name, attachment in prefixes.attachments.items():
        own = [each for each in trained if each.startswith(f"{MODULE}.{name}.")]
        if own:
            groups.append({"params": [trained.pop(each) for each in own], "lr": _rate_of(attachment.config, lr)})
    ids = set(map(id, prefixes.attachment.own_head(model).values()))
    head = [name for name, value in trained.items() if id(value) in ids]
    if head:
        groups.append({"params": [trained.pop(name) for name in head], "lr": head_lr})
    if trained and other_lr is None:
        first = ", ".join(map(repr, list(trained)[:SHOWN]))
        more = f" and {len(trained) - SHOWN} more" if len(trained) > SHOWN else ""
        raise ConfigError(
            f"{first}{more}: neither prefix nor head, and set to train; give a learning rate, other_lr=, or freeze them"
        )
    if trained:
        groups.append({"params": list(trained.values()), "lr": other_lr})
    return groups


def _rate_of(config: PrefixConfig, lr: float | None) -> float:
    """The rate that was asked for, or the recommended one."""
    if lr is None:
        return recommended_lr(config)
    check_lr(config, lr)
    return lr
