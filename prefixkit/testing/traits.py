"""What a bare model can do, found out without the adapter, and which tests therefore concern it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from prefixkit.testing.recording import eager_functions, recorded_calls, uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.testing.subject import Subject

Test = TypeVar("Test", bound=Callable[..., Any])

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a bare model can do.

    Attributes:
        encodes: It has an encoder.
        decodes: It has a decoder, whose attention is causal.
        on_interface: Its attention goes through transformers' attention interface.
        generates: It has ``generate``.
        windowed: Some of its layers have a sliding window.
        biased: Positions enter as a bias on the attention scores.
        position_ids: Its ``forward`` takes ``position_ids``.
        first_position: The id of the first token's position; not 0 where ids count reserved rows.
        checkpoints: It can checkpoint its layers.
        accelerated: It runs on an accelerator, where caches can be offloaded from.
        implementations: The attention implementations that it runs with, bare, and with the same outputs.
    """

    encodes: bool
    decodes: bool
    on_interface: bool
    generates: bool
    windowed: bool
    biased: bool
    position_ids: bool
    first_position: int
    checkpoints: bool
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
        return self.decodes

    @property
    def by_attention(self) -> bool:
        """The attention engine can serve it: off the interface through a ``site_forward``, if no cache will do."""
        return self.on_interface or not self.caches

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that can serve it."""
        return (("attention",) if self.by_attention else ()) + (("cache",) if self.caches else ())

    @property
    def both_engines(self) -> bool:
        """Either engine can serve it."""
        return len(self.engines) == 2


def traits_of(subject: Subject, *, accelerated: bool) -> Traits:
    """Find out by running the bare model."""
    model = subject.bare()
    with recorded_calls(model) as calls:
        subject.logits(model, **subject.inputs(batch=1))
    on_interface = bool(eager_functions(model))
    both = model.config.is_encoder_decoder
    causal = both or any(_is_causal(call.mask) for call in calls)
    return Traits(
        encodes=both or not causal,
        decodes=causal,
        on_interface=on_interface,
        generates=causal and model.can_generate(),
        windowed=any(call.options.get("sliding_window") for call in calls),
        biased=any(call.options.get("position_bias") is not None for call in calls),
        position_ids="position_ids" in signature(model.forward).parameters,
        first_position=_first_position(subject, model),
        checkpoints=bool(model.supports_gradient_checkpointing),
        accelerated=accelerated,
        # Off the interface there is the model's own attention, whatever name it is given.
        implementations=tuple(name for name in IMPLEMENTATIONS[: None if on_interface else 1] if _runs(subject, name)),
    )


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


def _is_causal(mask: Any) -> bool:
    """Whether an eager mask hides all later tokens from the first one (a window to both sides hides some)."""
    return mask is not None and mask.shape[-2] > 1 and bool((mask[..., 0, 1:] < 0).all())


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
