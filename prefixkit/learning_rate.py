"""Learning rates: a flat prefix and an MLP want ones that are a hundred times apart."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from prefixkit.discovery import installed
from prefixkit.errors import MethodError

if TYPE_CHECKING:
    from prefixkit.prefix_config import PrefixConfig

FAR = 10
"""By which factor a learning rate may differ from the recommended one without a warning."""


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
    """Warn of a learning rate that is more than ten times off the recommended one, if there is one.

    Warns:
        UserWarning: With both numbers.
    """
    warn_of(config, learning_rate, stacklevel=3)


def warn_of(config: PrefixConfig, learning_rate: float, *, stacklevel: int) -> None:
    """:func:`check_lr`, for a caller who stands ``stacklevel`` calls above."""
    try:
        recommended = recommended_lr(config)
    except MethodError:  # of a method that has none, or was never installed, there is nothing to say
        return
    if not recommended / FAR <= learning_rate <= recommended * FAR:
        warnings.warn(
            f"learning rate {learning_rate:g} is far from the {recommended:g} that suits method {config.method!r} as "
            "it is parametrised here: a flat prefix wants a rate about a hundred times an MLP's",
            stacklevel=stacklevel,
        )
