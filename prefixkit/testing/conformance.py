"""The class that a plugin's author subclasses, put together from its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from prefixkit.adapter import Adapter
from prefixkit.testing.accelerated import Accelerated
from prefixkit.testing.attention import Attention
from prefixkit.testing.deviation import Deviation
from prefixkit.testing.generation import Generation
from prefixkit.testing.life import Life
from prefixkit.testing.numbers import Numbers
from prefixkit.testing.parallel import Parallel
from prefixkit.testing.several import Several
from prefixkit.testing.sites import Sites
from prefixkit.testing.subject import Subject
from prefixkit.testing.training import Training
from prefixkit.testing.traits import Traits, concerns, traits_of
from prefixkit.testing.with_trainer import WithTrainer
from prefixkit.transformers_internals import VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("p-tuning-v2", "prefix-tuning")
REFUSED = "refused"
"""The property of a test report that holds the reason of a clear refusal."""


class Conformance(Sites, Numbers, Attention, Training, Generation, Several, WithTrainer, Life, Parallel, Accelerated):
    """All that an adapter has to fulfil. Subclass it, name the adapter, and make a tiny model.

    A test that does not concern the model (windows in a model without any) is not part of the
    subclass. A known deviation is named with its reason and has to fail, so that it cannot outlive
    its cause.

    Attributes:
        adapter: The adapter under test; an installed plugin is never looked for.
        device: Where the model runs.
        deviations: Tests that cannot pass, each with its reason.
        traits: What the model can do, found out from it.
    """

    pytestmark: ClassVar[pytest.MarkDecorator] = pytest.mark.conformance

    adapter: ClassVar[Adapter]
    device: ClassVar[str] = "cpu"
    deviations: ClassVar[tuple[Deviation, ...]] = ()
    traits: ClassVar[Traits]
    _left_out: ClassVar[dict[str, Any]] = {}

    def make_model(self) -> PreTrainedModel:
        """A tiny model: two or three layers, a vocabulary of 30 or more, 90 or more positions, no dropout.

        It needs one output for each token: a language model, a tagger, or the bare body. Its
        weights are replaced.
        """
        raise NotImplementedError("a conformance class makes a tiny model: def make_model(self)")

    def __init_subclass__(cls, **options: Any) -> None:
        """Leave out the tests that do not concern the model; check the names of the deviations."""
        super().__init_subclass__(**options)
        if cls.make_model is Conformance.make_model or not hasattr(cls, "adapter"):
            return  # a base class for others
        subject = cls._new_subject()
        cls.traits = subject.traits
        tests = [name for name in dir(cls) if name.startswith("test_")]
        for deviation in cls.deviations:
            if deviation.test not in tests:
                raise TypeError(f"{cls.__name__}.deviations names {deviation.test!r}, and there is no such test")
        for name, test in _left_out_above(cls).items():
            setattr(cls, name, test)
        cls._left_out = {}
        for name in tests:
            test = getattr(cls, name)
            if not concerns(test, cls.traits):
                cls._left_out[name] = test
                setattr(cls, name, None)

    @classmethod
    def _new_subject(cls) -> Subject:
        """To look at the model only; where the device is missing, its tests are made all the same."""
        device = cls.device if torch.device(cls.device).type == "cpu" or torch.accelerator.is_available() else "cpu"
        _check_model(cls.__name__, cls().make_model())
        subject = Subject(cls.adapter, cls().make_model, device)
        _check_outputs(cls.__name__, subject)
        subject.traits = traits_of(subject, accelerated=torch.device(cls.device).type != "cpu")
        if not subject.traits.engines:
            raise TypeError(
                f"{cls.__name__}.make_model gives a model that no engine can serve with transformers {VERSION}: it has "
                "no cache, its attention does not go through transformers' attention interface, and its adapter brings "
                "no site_forward"
            )
        return subject

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for all that it names among its arguments."""
        if not hasattr(self, "traits"):
            raise TypeError(f"{type(self).__name__} needs an adapter and a make_model")
        choices: dict[str, tuple[Any, ...]] = {
            "engine": self.traits.engines,
            "method": METHODS,
            "attention": self.traits.implementations,
            "positions": ("shift", "none"),
            "window": ("pinned", "slide") if self.traits.windowed else ("pinned",),
            "dtype": ("bfloat16", "float16"),
            "side": ("left", "right"),
        }
        for name, values in choices.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest) -> Iterator[Subject]:
        """The model under test."""
        subject = Subject(self.adapter, self.make_model, self.device)
        subject.traits = self.traits
        yield subject
        for reason in subject.refusals:
            request.node.user_properties.append((REFUSED, reason))

    @pytest.fixture(autouse=True)
    def _known_deviation(self, request: pytest.FixtureRequest) -> None:
        test = request.node.originalname
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        for deviation in self.deviations:
            if deviation.covers(test, parameters):
                request.applymarker(pytest.mark.xfail(strict=True, reason=deviation.reason))


def _left_out_above(cls: type[Conformance]) -> dict[str, Any]:
    """The tests that did not concern the nearest base class; on another device they may."""
    return next(vars(base)["_left_out"] for base in cls.__mro__[1:] if "_left_out" in vars(base))


def _check_model(name: str, model: object) -> None:
    """Refuse what no test could be fair to."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{name}.make_model returns {type(model).__name__}; it has to return a transformers model")
    config = model.config.get_text_config()
    for field, least in (("vocab_size", 30), ("max_position_embeddings", 90)):
        value = getattr(config, field, None)
        if isinstance(value, int) and value < least:
            raise TypeError(f"{name}.make_model gives a model with {field}={value}; the tests need {least} or more")


def _check_outputs(name: str, subject: Subject) -> None:
    """Refuse a model that does not answer token by token."""
    inputs = subject.inputs(batch=2)
    expected = tuple(inputs.get("decoder_input_ids", inputs["input_ids"]).shape)
    found = tuple(subject.logits(subject.bare(), **inputs).shape)
    if found[:2] != expected or len(found) != 3:
        raise TypeError(
            f"{name}.make_model gives a model whose outputs are {found} for {expected} tokens; it has to give one "
            "vector for each token: a language model, a tagger, or the bare body"
        )
