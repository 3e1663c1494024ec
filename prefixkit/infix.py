"""A prefix between a text and its continuation, ``[x; PREFIX; y]``: an ablation of Li & Liang 2021, §7.2.

Tokens of x do not see it, and keep their positions. Those of y see x and the prefix, and stand P further. The
first of y is the token that predicts the first label: the last of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.adapter import RelativeBias
from prefixkit.errors import ConfigError, EngineError
from prefixkit.own_generate import OwnGenerate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.adapter import Stack
    from prefixkit.call import StackCall
    from prefixkit.prefix_config import PrefixConfig
    from prefixkit.prefixes import Prefixes

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class Frame:
    """Where y begins in each row of a call, ``(batch or 1,)``.

    Attributes:
        identity: Of the prefixes whose model is called.
        starts: ``None`` if nothing says it.
        outer: What held before the call.
        generates: Whether the call is ``generate``, so that it holds for the forwards in it.
    """

    identity: str
    starts: torch.Tensor | None
    outer: Frame | None
    generates: bool = False


_starts: ContextVar[Frame | None] = ContextVar("prefixkit_starts", default=None)


def _frame_of(identity: str, *, generates: bool) -> Frame | None:
    frame = _starts.get()
    while frame is not None and (frame.identity != identity or (generates and not frame.generates)):
        frame = frame.outer
    return frame


def place_infix(arguments: dict[str, Any], call: StackCall, identity: str) -> torch.Tensor:
    """Which queries of a stack's call stand behind the prefix, ``(batch or 1, queries)``.

    Raises:
        EngineError: If nothing says where y begins, or a row holds several texts.
    """
    if arguments.get("attention_mask") is None:
        places = arguments.get("position_ids")
        if places is not None and bool((places.diff(dim=-1) < 0).any()):
            raise EngineError("infix=True takes one text in a row; these position_ids begin anew, as in packed rows")
        if isinstance(call.past, int):
            # Without a mask, transformers takes a leap in the positions for the next of several packed texts.
            whole = torch.ones(call.batch, call.past + call.queries, dtype=torch.long, device=call.device)
            arguments["attention_mask"] = whole
    return _queries_behind(call, identity)


def _queries_behind(call: StackCall, identity: str) -> torch.Tensor:
    frame = _frame_of(identity, generates=False)
    if frame is None or frame.starts is None:
        raise EngineError(
            "infix=True puts the prefix between a text and its continuation, and nothing says where that begins: "
            "pass labels, with -100 for the text, or call generate()"
        )
    places = torch.arange(call.queries, device=call.device) + call.past
    return places >= frame.starts.to(call.device)[:, None]


def check_infix(config: PrefixConfig, stacks: Iterable[Stack]) -> None:
    """Raise where ``[x; PREFIX; y]`` means nothing, or cannot be had.

    Raises:
        ConfigError: For a model, or with options, that it does not go with.
        EngineError: For attention off the interface. The cache engine refuses an infix itself.
    """
    carrying = [stack for stack in stacks if stack.sites]
    kinds = sorted({site.stack for stack in carrying for site in stack.sites})
    if kinds != ["decoder"] or any(isinstance(stack.positions, RelativeBias) for stack in carrying):
        raise ConfigError(
            f"infix=True is for models that are a decoder and nothing else, without a bias of positions; this one has "
            f"{', '.join(kinds)} attention"
        )
    for stack in carrying:
        if stack.site_forward is not None:
            raise EngineError(
                f"the attention of {stack.path!r} is not on transformers' attention interface; infix=True is not served"
            )
    if config.gate or config.window == "slide":
        raise ConfigError("infix=True goes with neither gate=True nor window='slide'")


class BeforeLabels:
    """Forward pre-hook of the model: the first label says where y begins."""

    def __init__(self, prefixes: Prefixes, names: tuple[str, ...]) -> None:
        self.prefixes = prefixes
        self.identity: str = prefixes.identity
        self.names = names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note it for this call, or what :class:`GenerateBehind` said still holds."""
        if not self.prefixes.puts_behind:
            return
        labels = {**dict(zip(self.names, args, strict=False)), **kwargs}.get("labels")
        generating = _frame_of(self.identity, generates=True)
        starts = generating.starts if generating else None
        if labels is not None and labels.ndim != 2:
            raise EngineError(f"infix=True needs a label for each token; these are {tuple(labels.shape)}")
        if labels is not None:
            known = labels != IGNORED
            starts = torch.where(known.any(dim=1), known.int().argmax(dim=1) - 1, labels.shape[1]).clamp(min=0)
        _starts.set(Frame(self.identity, starts, _starts.get()))


class AfterLabels:
    """Forward hook of the model, also where its forward fails: forget what :class:`BeforeLabels` noted."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.prefixes = prefixes

    def __call__(self, *_: Any) -> None:
        """Forget it."""
        if self.prefixes.puts_behind:
            frame = _starts.get()
            _starts.set(frame.outer if frame else None)


class GenerateBehind(OwnGenerate):
    """Stands in for ``model.generate``: y begins with the last token of the prompt."""

    def __init__(self, model: PreTrainedModel, prefixes: Prefixes) -> None:
        super().__init__(model)
        self.prefixes = prefixes
        self.identity: str = prefixes.identity

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class."""
        if not self.prefixes.puts_behind:
            return self.original()(*args, **kwargs)
        cache = internals.cache_among(kwargs)
        if cache is not None and cache.get_seq_length():
            raise EngineError(
                "with infix=True a cache that holds a text cannot start generate(): its tokens stand before and behind "
                "an earlier infix; pass the whole text without a cache"
            )
        given = [*(kwargs.get(name) for name in ("inputs_embeds", "inputs", "input_ids")), *args[:1]]
        prompt = next((value for value in given if value is not None), None)
        if prompt is None:
            raise EngineError("generate() with infix=True needs a prompt: its last token stands behind the prefix")
        starts = torch.tensor([prompt.shape[1] - 1])
        token = _starts.set(Frame(self.identity, starts, _starts.get(), generates=True))
        try:
            return self.original()(*args, **kwargs)
        finally:
            _starts.reset(token)
