"""What a bare model can do, found out without the adapter, and which tests therefore concern it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from prefixkit.testing.jobs import PROCESSES
from prefixkit.testing.recording import is_on_interface, recorded_calls, uncompiled, window_inside
from prefixkit.transformers_internals import attention_implementation_of, cache_in, spreads_visibly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.testing.attention_call import AttentionCall
    from prefixkit.testing.subject import Subject

Test = TypeVar("Test", bound=Callable[..., Any])

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
LONGER = 12
"""Tokens of a text that is longer than a window."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a bare model can do.

    Attributes:
        on_interface: Its attention goes through transformers' attention interface.
        reachable: The attention engine can serve it: it is on the interface, or the adapter brings a
            ``site_forward``.
        encodes: It has an encoder.
        decodes: It has a decoder, whose attention is causal.
        keeps: Its native cache keeps what its attention is given, one layer for each call: no latents, no
            layers that share keys, none of another kind.
        generates: It has ``generate``.
        windowed: Some of its layers have a sliding window.
        biased: Positions enter as a bias on the attention scores.
        position_ids: Its ``forward`` takes ``position_ids``.
        first_position: The id of the first token's position; not 0 where ids count reserved rows.
        checkpoints: It can checkpoint its layers.
        spreads: transformers has a tensor-parallel plan for it, which two processes can follow.
        accelerated: It runs on an accelerator, where caches can be offloaded from.
        implementations: The attention implementations that it runs with, bare, and with the same outputs.
    """

    on_interface: bool
    reachable: bool
    encodes: bool
    decodes: bool
    keeps: bool
    generates: bool
    windowed: bool
    biased: bool
    position_ids: bool
    first_position: int
    checkpoints: bool
    spreads: bool
    accelerated: bool
    implementations: tuple[str, ...]

    @property
    def decoder_only(self) -> bool:
        """It is a decoder and nothing else."""
        return self.decodes and not self.encodes

    @property
    def prompt_decodes(self) -> bool:
        """It generates from a prompt, not from a source text."""
        return self.decoder_only and self.generates

    @property
    def packs(self) -> bool:
        """Several texts fit in one row, told apart by their positions."""
        return self.decoder_only and self.position_ids

    @property
    def on_cpu(self) -> bool:
        """It runs on the CPU, where processes talk through gloo."""
        return not self.accelerated

    @property
    def has_sdpa(self) -> bool:
        """It runs with torch's scaled_dot_product_attention."""
        return "sdpa" in self.implementations

    @property
    def sees_everything(self) -> bool:
        """None of its layers has a window."""
        return not self.windowed

    @property
    def caches(self) -> bool:
        """Part of it takes a key-value cache, so the cache engine can serve that part."""
        return self.decodes and self.keeps

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that can serve it."""
        return (("attention",) if self.reachable else ()) + (("cache",) if self.caches else ())

    @property
    def both_engines(self) -> bool:
        """Either engine can serve it."""
        return len(self.engines) == 2


def traits_of(subject: Subject, *, accelerated: bool) -> Traits:
    """Find out by running the bare model."""
    model = subject.bare()
    with recorded_calls(model) as calls:
        subject.logits(model, **subject.inputs(batch=1))
    both = model.config.is_encoder_decoder
    causal = both or _is_causal(subject, model)
    on_interface = is_on_interface(model)
    windows = [call.options.get("sliding_window") for call in calls]
    if causal and not on_interface:
        windows = [window_inside(model, call.path, subject.tokens(1, LONGER)) for call in calls]
    own = attention_implementation_of(model.config)  # off the interface it is settled when a model is made
    return Traits(
        on_interface=on_interface,
        reachable=on_interface or any(stack.site_forward is not None for stack in subject.adapter.stacks(model)),
        encodes=both or not causal,
        decodes=causal,
        keeps=not on_interface or both or _keeps(subject, model, calls),
        generates=causal and model.can_generate(),
        windowed=any(windows),
        biased=any(call.options.get("position_bias") is not None for call in calls),
        position_ids="position_ids" in signature(model.forward).parameters,
        first_position=_first_position(subject, model),
        checkpoints=bool(model.supports_gradient_checkpointing),
        spreads=_spreads(model),
        accelerated=accelerated,
        implementations=tuple(name for name in IMPLEMENTATIONS if _runs(subject, name)) if on_interface else (own,),
    )


def _keeps(subject: Subject, model: PreTrainedModel, calls: list[AttentionCall]) -> bool:
    """Whether the native cache of a decoder has a layer of the same shape for each attention call."""
    if "use_cache" not in signature(model.forward).parameters:
        return False
    with torch.no_grad():
        cache = cache_in(model(**subject.inputs(batch=1), use_cache=True))
    kept = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    shapes = [None if key is None else (key.shape[1], key.shape[3]) for key in kept]
    return shapes == [(call.key.shape[1], call.key.shape[3]) for call in calls]


def _spreads(model: PreTrainedModel) -> bool:
    """Whether there is a plan, of a version of transformers that leaves the weights visibly spread, and even heads."""
    config = model.config.get_text_config()
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    even = all(heads is None or heads % PROCESSES == 0 for heads in heads)
    return spreads_visibly() and bool(model.supports_tp_plan) and getattr(model, "tp_plan", None) != {} and even


def _first_position(subject: Subject, model: PreTrainedModel) -> int:
    """With which id the model starts to count by itself."""
    if "position_ids" not in signature(model.forward).parameters:
        return 0
    inputs = subject.inputs(batch=1)
    expected = subject.logits(model, **inputs)
    places = torch.arange(inputs["input_ids"].shape[1], device=expected.device)[None]
    for first in range(8):
        found = subject.logits(model, **inputs, position_ids=places + first)
        if torch.allclose(found, expected, atol=1e-5):
            return first
    raise AssertionError("position_ids from 0 to 7 as the first all give other outputs than none")


def _is_causal(subject: Subject, model: PreTrainedModel) -> bool:
    """Whether the last token changes no output before its own."""
    ids = subject.inputs(batch=1)["input_ids"]
    other = ids.clone()
    other[0, -1] = next(token for token in subject.tokens(40) if token != ids[0, -1])
    before, after = (subject.logits(model, input_ids=each)[:, :-1] for each in (ids, other))
    return torch.allclose(before, after, atol=1e-5)


def _runs(subject: Subject, name: str) -> bool:
    """Whether the bare model runs with an attention implementation, and as it does with the eager one.

    transformers refuses with the errors below; some versions drop soft caps under sdpa instead, or
    see padding under flex attention.
    """
    whole = subject.inputs(batch=1)
    padded = {**whole, "attention_mask": whole["attention_mask"].clone()}
    padded["attention_mask"][:, :3] = 0
    try:
        return all(_runs_alike(subject, name, inputs) for inputs in (whole, padded))
    except (ValueError, ImportError):
        return False


def _runs_alike(subject: Subject, name: str, inputs: dict[str, torch.Tensor]) -> bool:
    expected = subject.logits(subject.bare(attention="eager"), **inputs)
    model = subject.bare(attention=name)
    with uncompiled():
        found = subject.logits(model, **inputs)
    real = ... if subject.is_encoder_decoder else inputs["attention_mask"].bool()
    return torch.allclose(found[real], expected[real], atol=1e-4, rtol=1e-4)


def needs(*names: str) -> Callable[[Test], Test]:
    """Mark a test as one for models with these :class:`Traits` only; others do not get it at all.

    Example::

        @needs("generates")
        def test_of_my_own(self, subject): ...
    """

    def mark(test: Test) -> Test:
        test.__dict__["needed_traits"] = names
        return test

    return mark


def concerns(test: Any, traits: Traits) -> bool:
    """Whether a model with ``traits`` has to pass ``test``."""
    return all(getattr(traits, name) for name in getattr(test, "needed_traits", ()))
