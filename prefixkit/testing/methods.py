"""Tests that a method has to pass, whatever it gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

import prefixkit
from prefixkit.errors import MethodError
from prefixkit.initialisation import FIT_CLOSE
from prefixkit.method import MEMORY, PREFIX
from prefixkit.testing.subject import enable_checkpointing

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from prefixkit import Method

VOCABULARY = 62


class MethodConformance:
    """The tests of a method: subclass it, name the method and make a tiny model.

    Example::

        class TestLowRank(MethodConformance):
            method = next(my_plugin.prefixkit_methods())
            options = {"rank": 4}

            def make_model(self):
                return MyModelForCausalLM(MyConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))

    Attributes:
        method: The method under test; it need not be installed.
        options: Options for :func:`prefixkit.apply`.
        num_virtual_tokens: Length of the prefix.
    """

    method: ClassVar[Method]
    options: ClassVar[Mapping[str, Any]] = {}
    num_virtual_tokens: ClassVar[int] = 5

    def make_model(self) -> PreTrainedModel:
        """A tiny decoder with a vocabulary of 62 or more; the author writes this one."""
        raise NotImplementedError(f"{type(self).__name__} has no make_model")

    def _bare(self) -> Any:
        torch.manual_seed(0)
        model: Any = self.make_model()
        model.eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.2)
        return model

    def _applied(self, **options: Any) -> Any:
        settings: dict[str, Any] = {"num_virtual_tokens": self.num_virtual_tokens, "positions": "none"}
        return prefixkit.apply(self._bare(), self.method, **{**settings, **self.options, **options})

    @staticmethod
    def _ids(seed: int = 1) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))

    def _logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(self._ids()).logits
        return logits

    def _trained(self, steps: int = 3) -> Any:
        model = self._applied()
        self._train(model, steps)
        return model

    def _train(self, model: Any, steps: int) -> list[float]:
        optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.01)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=self._ids(), labels=self._ids()).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    @pytest.mark.parametrize("default", [torch.float32, torch.float16, torch.float64])
    def test_parameters_are_float32_whatever_the_default(self, default: torch.dtype) -> None:
        """A half-precision prefix does not train."""
        model = self._bare()
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            settings: dict[str, Any] = {"positions": "none", "init": "random", **self.options}
            prefixkit.apply(model, self.method, num_virtual_tokens=self.num_virtual_tokens, **settings)
        finally:
            torch.set_default_dtype(before)
        assert {value.dtype for value in model.get_submodule("prefixkit").parameters()} == {torch.float32}

    def test_it_trains_and_the_base_does_not(self) -> None:
        """Every parameter moves, the loss falls, and no weight of the base changes."""
        model = self._applied()
        base = {name: value.clone() for name, value in self._bare().state_dict().items()}
        own = {name: value.clone() for name, value in model.get_submodule("prefixkit").named_parameters()}
        losses = self._train(model, 20)
        assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
        for name, value in model.get_submodule("prefixkit").named_parameters():
            assert not torch.equal(value, own[name]), f"{name} did not change in 20 steps"
        assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())

    def test_it_gives_the_same_twice(self) -> None:
        """What a prefix encoder gives depends on its parameters only."""
        model = self._trained()
        assert torch.equal(self._logits(model), self._logits(model))

    def test_two_models_share_nothing(self) -> None:
        """Training one prefix leaves another alone."""
        other = self._applied()
        before = self._logits(other)
        self._trained()
        assert torch.equal(self._logits(other), before)

    def test_unknown_options_are_refused(self) -> None:
        """By name."""
        with pytest.raises(MethodError, match="has no option 'no_such_option'"):
            self._applied(no_such_option=1)

    def test_it_starts_where_it_is_asked_to(self) -> None:
        """One with a method ``start`` gives what ``init=`` asks for."""
        model = self._applied(init="random")
        encoder = model.get_submodule("prefixkit.default")
        if self.method.gives == MEMORY or not hasattr(encoder, "start"):
            return
        with torch.no_grad():
            wanted = torch.randn_like(encoder())
            encoder.start(wanted)
            assert (encoder() - wanted).norm() < FIT_CLOSE * wanted.norm()

    def test_saved_and_loaded_it_is_the_same(self, tmp_path: Path) -> None:
        """And trains on to the same numbers."""
        model = self._trained()
        prefixkit.save(model, tmp_path)
        again = self._bare()
        torch.manual_seed(7)  # what is random in the encoder has to come from the file
        prefixkit.load(again, tmp_path, trainable=True, method=self.method)
        assert torch.equal(self._logits(again), self._logits(model))
        assert self._train(again, 2) == self._train(model, 2)

    def test_folded_it_is_the_same_without_the_method(self, tmp_path: Path) -> None:
        """What is shipped needs no plugin."""
        model = self._trained()
        expected = self._logits(model)
        prefixkit.fold(model)
        torch.testing.assert_close(self._logits(model), expected, atol=1e-5, rtol=1e-4)
        prefixkit.save(model, tmp_path)
        if self.method.gives == MEMORY:
            return
        again = prefixkit.load(self._bare(), tmp_path)
        torch.testing.assert_close(self._logits(again), expected, atol=1e-5, rtol=1e-4)

    def test_copies_are_their_own(self) -> None:
        """A deep copy gives the same, and trains apart."""
        model = self._trained()
        copied = copy.deepcopy(model)
        before = self._logits(model)
        assert torch.equal(self._logits(copied), before)
        self._train(copied, 2)
        assert torch.equal(self._logits(model), before)

    def test_generation_is_recomputation(self) -> None:
        """With a cache and without."""
        model = self._trained()
        settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        cached, recomputed = (model.generate(self._ids(), **settings, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, recomputed)

    def test_checkpointing_gives_equal_gradients(self) -> None:
        """Layers that are computed again get the same prefix."""
        gradients = []
        for checkpointing in (False, True):
            model = self._trained().train()
            model.zero_grad()
            if checkpointing:
                enable_checkpointing(model)
            model(input_ids=self._ids()).logits.square().mean().backward()
            gradients.append([value.grad for value in model.get_submodule("prefixkit").parameters()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)

    def test_disabled_and_removed_it_is_the_base(self) -> None:
        """Bit for bit."""
        model = self._trained().requires_grad_(False)
        base = self._logits(self._bare().requires_grad_(False))
        with prefixkit.disabled(model):
            assert torch.equal(self._logits(model), base)
        assert (self.method.gives != PREFIX) or not torch.equal(self._logits(model), base)
        assert torch.equal(self._logits(prefixkit.remove(model)), base)
