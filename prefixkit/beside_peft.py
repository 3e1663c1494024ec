"""Adapters of PEFT (LoRA and others) on the same model: what is theirs stays theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT put layers of its own into the model, by ``add_adapter`` or ``get_peft_model``."""
    return any(map(_is_of_peft, model.modules()))


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of PEFT's adapters by name, without those of the layers that they wrap."""
    return {
        name: parameter
        for path, module in model.named_modules()
        if _is_of_peft(module)
        for name, parameter in module.named_parameters(prefix=path)
        if ".base_layer." not in name
    }


def _is_of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")
