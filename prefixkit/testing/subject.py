"""One model under test: bare, with a prefix, and the inputs and outputs to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import prefixkit
from prefixkit.adapter import Adapter
from prefixkit.errors import EngineError
from prefixkit.testing.recording import set_attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.testing.traits import Traits

TOKENS = 5
"""Length P of the prefixes."""
NEW = 6
"""Tokens to generate."""


class Subject:
    """The adapter and the tiny model that a conformance class names; tests get one as ``subject``.

    Example::

        model = subject.with_prefix(engine="cache", positions="none")
        outputs = subject.logits(model, **subject.inputs(batch=2))  # (2, tokens, width)

    Args:
        adapter: The adapter under test.
        make_model: Makes the tiny model.
        device: Where it runs.
    """

    def __init__(self, adapter: Adapter, make_model: Callable[[], PreTrainedModel], device: str = "cpu") -> None:
        self.adapter = adapter
        self.make_model = make_model
        self.device: torch.device = torch.device(device)
        self.refusals: list[str] = []
        config = self.bare().config
        text = config.get_text_config()
        self.vocabulary: int = int(text.vocab_size)
        self.is_encoder_decoder: bool = bool(config.is_encoder_decoder)
        special = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
        self.padding: int = int(special[0]) if isinstance(special[0], int) else 0
        self.special: set[int] = {value for value in (*special, self.padding) if isinstance(value, int)}
        self.traits: Traits

    def bare(self, *, attention: str | None = None, seed: int = 0, training: bool = False) -> PreTrainedModel:
        """A bare model whose weights are large enough for attention to matter, the same for the same seed."""
        torch.manual_seed(seed)
        model: Any = self.make_model().train(training)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.2)
        if attention is not None:
            set_attention_implementation(model, attention)
        _generate_without_end(model)
        model.to(self.device)
        made: PreTrainedModel = model
        return made

    def apply(
        self, model: PreTrainedModel, *, engine: str | None = None, strong: bool = True, **options: Any
    ) -> PreTrainedModel:
        """Give ``model`` a prefix, under the policies that ``engine`` can honour.

        Args:
            model: A bare model.
            engine: ``"attention"`` or ``"cache"``; by default the first that can serve the model.
            strong: Make the prefix as large as a model's own keys and values.
            **options: As for :func:`prefixkit.apply`.
        """
        engine = engine or self.traits.engines[0]
        settings: dict[str, Any] = {"num_virtual_tokens": TOKENS, "init": "random", **self.cacheable(engine), **options}
        prefixkit.apply(model, adapter=self.adapter, engine=engine, **settings)
        if strong and "init" not in options:
            strengthen(model)
        return model

    def with_prefix(self, *, attention: str | None = None, training: bool = False, **options: Any) -> PreTrainedModel:
        """A new model with a prefix; arguments as for :meth:`bare` and :meth:`apply`."""
        return self.apply(self.bare(attention=attention, training=training), **options)

    def cacheable(self, engine: str) -> dict[str, Any]:
        """The settings under which ``engine`` can serve this model."""
        if engine != "cache":
            return {}
        window = {"window": "slide"} if self.traits.windowed else {}
        return {**window, **({"stacks": ("decoder", "cross")} if self.is_encoder_decoder else {})}

    @contextmanager
    def may_refuse(self, engine: str) -> Iterator[None]:
        """The cache engine may raise an :exc:`~prefixkit.EngineError` in the block, which ends there."""
        try:
            yield
        except EngineError as error:
            if engine != "cache":
                raise
            self.refusals.append(str(error))

    def tokens(self, *shape: int, seed: int = 1) -> torch.Tensor:
        """Random token ids, none of them special."""
        ordinary = torch.tensor([token for token in range(self.vocabulary) if token not in self.special])
        generator = torch.Generator().manual_seed(seed)
        return ordinary[torch.randint(len(ordinary), shape, generator=generator)].to(self.device)

    def inputs(self, batch: int = 2, length: int = 7, targets: int = 4) -> dict[str, torch.Tensor]:
        """Unpadded inputs of a forward pass."""
        ids = self.tokens(batch, length)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.tokens(batch, targets, seed=2)
        return inputs

    def padded(self, rows: Sequence[torch.Tensor], *, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of different lengths as one batch ``(rows, longest)``, and its mask."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.padding, device=self.device)
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        for index, row in enumerate(rows):
            part = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[index, part] = row
            mask[index, part] = 1
        return ids, mask

    def ragged(self, *lengths: int) -> list[torch.Tensor]:
        """Rows of these lengths."""
        return [self.tokens(length, seed=length) for length in lengths]

    def outputs(self, model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
        """One vector of numbers for each token: logits, or the last hidden states."""
        return numbers_of(model(**arguments))

    def logits(self, model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
        """:meth:`outputs` without a graph."""
        with torch.no_grad():
            return self.outputs(model, **arguments)

    def loss(self, model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
        """A number that depends on every output differently."""
        return loss_of(self.outputs(model, **arguments))

    def gradients(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Copies of the gradients of all that trains."""
        found = [value.grad for value in model.parameters() if value.requires_grad]
        return [torch.zeros(0) if gradient is None else gradient.detach().clone() for gradient in found]

    def flat_of(self, model: PreTrainedModel) -> torch.nn.Parameter:
        """The flat prefix ``(P, width)`` of a model tuned with ``"p-tuning-v2"``."""
        weight = model.get_parameter("prefixkit.default.embedding.weight")
        assert isinstance(weight, torch.nn.Parameter)
        return weight

    def generate(
        self, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **other: Any
    ) -> Any:
        """``NEW`` tokens; ``other`` as for ``model.generate``."""
        mask = torch.ones_like(ids) if mask is None else mask
        settings = {"max_new_tokens": NEW, "do_sample": False, **other}
        return model.generate(input_ids=ids, attention_mask=mask, **settings)  # type: ignore[operator]


def strengthen(model: PreTrainedModel) -> None:
    """Make the prefix of ``model`` as large as a model's own keys and values, the same for the same shapes.

    The weights of an MLP are divided by the square root of what they sum over, which keeps its
    output as large as its input, and rounding small.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("prefixkit."):
                generator = torch.Generator().manual_seed(len(name))
                size = 1.0 if "embedding" in name else weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)


def numbers_of(output: Any) -> torch.Tensor:
    """Of what a model returned, one vector of numbers for each token: logits, or the last hidden states."""
    numbers: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return numbers


def loss_of(numbers: torch.Tensor) -> torch.Tensor:
    """A mean over rows that depends on every output differently; of a batch, the mean of its halves'."""
    weights = torch.randn(numbers.shape[-1], generator=torch.Generator().manual_seed(7))
    return (numbers.float() * weights.to(numbers.device)).square().mean()


def enable_checkpointing(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Switch checkpointing on, under the name that this version of transformers has for it."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def _generate_without_end(model: PreTrainedModel) -> None:
    """Have ``generate`` go on to the length asked for."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(settings, name, None)
    if settings.pad_token_id is None:
        settings.pad_token_id = 0
