"""The same prefix on the same weights, by each library."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

import prefixkit
from benchmarks.speed.cells import BASE, CACHE_ENGINE, PEFT, PEFT_MLP, PREFIXKIT, PREFIXKIT_MLP
from benchmarks.speed.models import twin

HIDDEN = 2048
"""Width of the MLP's middle, for both."""


@dataclass(frozen=True)
class Start:
    """What every library starts from.

    Attributes:
        base: The frozen model.
        tokens: Virtual tokens, P.
        folder: A checkpoint of PEFT, which both read.
        trainable: Whether the prefix is a parameter, or as it is served.
    """

    base: Any
    tokens: int
    folder: str
    trainable: bool


def new_by_peft(start: Start, **options: Any) -> Any:
    """A new prefix of PEFT, with its own random start."""
    task = "SEQ_2_SEQ_LM" if start.base.config.is_encoder_decoder else "CAUSAL_LM"
    torch.manual_seed(1)
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=start.tokens, **options)
    return get_peft_model(twin(start.base), config)


def by_peft(start: Start) -> Any:
    """PEFT's model from its checkpoint; to train it has to be made anew, with the same numbers from the same seed."""
    return new_by_peft(start) if start.trainable else PeftModel.from_pretrained(twin(start.base), start.folder)


def by_prefixkit(start: Start) -> Any:
    """The attention engine, from the same checkpoint."""
    return prefixkit.load(twin(start.base), start.folder, trainable=start.trainable)


def by_cache_engine(start: Start) -> Any:
    """The cache engine, with the same numbers."""
    loaded = prefixkit.load(twin(start.base), start.folder, trainable=True)
    (flat,) = (value.detach() for value in loaded.parameters() if value.requires_grad)
    model = prefixkit.apply(twin(start.base), num_virtual_tokens=start.tokens, engine="cache", init=flat)
    return model if start.trainable else model.requires_grad_(False)


def mlp_by_peft(start: Start) -> Any:
    """Prefix tuning through an MLP; PEFT's checkpoints have none, so it is made here."""
    return new_by_peft(start, prefix_projection=True, encoder_hidden_size=HIDDEN)


def mlp_by_prefixkit(start: Start) -> Any:
    """The same MLP with the same weights; it has the same names in both."""
    theirs = mlp_by_peft(start).prompt_encoder["default"]
    options = {"method": "prefix-tuning", "num_virtual_tokens": start.tokens, "encoder_hidden_size": HIDDEN}
    model = prefixkit.apply(twin(start.base), init="random", **options)
    mine = {name.split(".", 2)[-1]: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            mine[name].copy_(value)
    return model


MAKERS: dict[str, Callable[[Start], Any]] = {
    PREFIXKIT: by_prefixkit,
    CACHE_ENGINE: by_cache_engine,
    PEFT: by_peft,
    PREFIXKIT_MLP: mlp_by_prefixkit,
    PEFT_MLP: mlp_by_peft,
    BASE: lambda start: twin(start.base),
}


def made(names: Iterable[str], base: Any, tokens: int, *, trainable: bool) -> dict[str, Any]:
    """A model for each of these contenders, in training mode if it trains."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot look the base up on the hub
        start = Start(base, tokens, folder, trainable)
        new_by_peft(start).save_pretrained(folder)
        return {name: MAKERS[name](start).train(trainable) for name in names}


def fresh(cache: Any) -> Any:
    """A cache of its own for one run, since generation appends to it."""
    return copy.deepcopy(cache)
