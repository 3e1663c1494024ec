"""A prefix between a text and its continuation, ``[x; PREFIX; y]``: an ablation of Li & Liang 2021, §7.2.

Tokens of x do not see it, and keep their positions. Those of y see x and the prefix, and stand P further. The
first of y is the token that predicts the first label: the last of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit.adapter import RelativeBias
from prefixkit.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.adapter import Stack
    from prefixkit.call import StackCall
    from prefixkit.prefix_config import PrefixConfig

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class Frame:
    """Where y begins in each row of the call under way, ``(batch or 1,)``, and what held outside of it."""

    starts: torch.Tensor | None
    outer: Frame | None


_starts: ContextVar[Frame | None] = ContextVar("prefixkit_starts", default=None)


def queries_behind(call: StackCall) -> torch.Tensor:
    """Which queries of a stack's call stand behind the prefix, ``(batch or 1, queries)``.

    Raises:
        EngineError: If nothing says where y begins.
    """
    frame = _starts.get()
    if frame is None or frame.starts is None:
        raise EngineError(
            "infix=True puts the prefix between a text and its continuation, and nothing says where that begins: "
            "pass labels, with -100 for the text, or call generate()"
        )
    places = torch.arange(call.queries, device=call.device) + call.past
    return places >= frame.starts.to(call.device)[:, None]


def check_infix(config: PrefixConfig, stacks: Iterable[Stack], engine: str) -> None:
    """Raise where ``[x; PREFIX; y]`` means nothing, or cannot be had.

    Raises:
        ConfigError: For a model, or with options, that it does not go with.
        EngineError: For the cache engine.
    """
    if engine != "attention":
        raise EngineError("a native cache cannot hide an infix from the text before it; use engine='attention'")
    carrying = [stack for stack in stacks if stack.sites]
    kinds = sorted({site.stack for stack in carrying for site in stack.sites})
    if kinds != ["decoder"] or any(isinstance(stack.positions, RelativeBias) for stack in carrying):
        raise ConfigError(
            f"infix=True is for models that are a decoder and nothing else, without a bias of positions; this one has "
            f"{', '.join(kinds)} attention"
        )
    if config.gate or config.window == "slide":
        raise ConfigError("infix=True goes with neither gate=True nor window='slide'")


class BeforeLabels:
    """Forward pre-hook of the model: the first label says where y begins."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note it for this call, or what :class:`GenerateBehind` said still holds."""
        labels = {**dict(zip(self.names, args, strict=False)), **kwargs}.get("labels")
        outer = _starts.get()
        starts = outer.starts if outer else None
        if labels is not None:
            known = labels != IGNORED
            starts = torch.where(known.any(dim=1), known.int().argmax(dim=1) - 1, labels.shape[1]).clamp(min=0)
        _starts.set(Frame(starts, outer))


def after_labels(*_: Any) -> None:
    """Forward hook of the model, also where its forward fails: forget what :class:`BeforeLabels` noted."""
    frame = _starts.get()
    _starts.set(frame.outer if frame else None)


class GenerateBehind:
    """Stands in for ``model.generate``: y begins with the last token of the prompt."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __signature__(self) -> Signature:
        return signature(self._original())

    def _original(self) -> Callable[..., Any]:
        method: Callable[..., Any] = type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class."""
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((value for value in given if value is not None), None)
        if prompt is None:
            raise EngineError("generate() with infix=True needs a prompt: its last token stands behind the prefix")
        token = _starts.set(Frame(torch.tensor([prompt.shape[1] - 1]), _starts.get()))
        try:
            return self._original()(*args, **kwargs)
        finally:
            _starts.reset(token)
