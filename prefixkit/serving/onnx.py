"""ONNX: the decoder as a graph, beside a file with the prefix, or with the prefix in it.

The graph of ``model.onnx`` is the bare decoder's. The prefix is what it gets as its first past. In the graph of
``with_prefix.onnx`` the keys and values stand in front of the past by themselves: neither the past nor the mask knows
of them, so that a program which serves any decoder serves it.

Both count positions from the mask, so that a row padded on the left gives what it gives alone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.as_it_was import as_it_was
from prefixkit.errors import CheckpointError, EngineError
from prefixkit.lifecycle import disabled
from prefixkit.serving.prefix_file import PREFIX, Pairs, needed, prefix_of, read_prefix, write_prefix
from prefixkit.serving.verdict import Answer, Verdict, answers_of, ends_of, greedy, judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from transformers import PreTrainedModel

name = "onnx"
BARE = "model.onnx"
BAKED = "with_prefix.onnx"
BATCH, LENGTH, PAST = 2, 3, 4
"""Sizes of the inputs that the graph is traced with, none of which stays in it."""


def write(model: PreTrainedModel, folder: Path, *, baked: bool = False) -> None:
    """Write ``model.onnx``, the bare decoder, and ``prefix.safetensors``, what to feed it as its first past.

    Both graphs take ``input_ids (batch, length)``, ``attention_mask (batch, past + length)`` and for each layer
    ``past_key_values.N.key`` and ``.value (batch, kv_heads, past, dim)``; they give ``logits`` and ``present.N.key``
    and ``.value``, the past of the next call. To the bare one the P virtual tokens are past, and the mask has ones
    for them.

    Args:
        model: A decoder-only model with a prefix, in float32 or float16.
        folder: Made if there is none.
        baked: Write ``with_prefix.onnx`` too, whose past is the text alone: its first call gets a past of length 0,
            and its mask covers the text.

    Raises:
        AttachmentError: If the model has no prefix.
        EngineError: If keys and values do not say it all, the dtype is one that onnxruntime does not compute in, or
            a package is missing.
        UnsupportedModelError: If the model attends to an encoder.
    """
    for package in ("onnx", "onnxscript"):
        needed(package, "onnx")
    if model.dtype not in (torch.float32, torch.float16):
        raise EngineError(f"onnxruntime does not run a decoder in {model.dtype} on a CPU; call model.float() first")
    folder = Path(folder)
    pairs = prefix_of(model)
    programs = {BARE: _graph(model, Step(model, []), pairs)}
    if baked:
        programs[BAKED] = _graph(model, Step(model, pairs), pairs)
    write_prefix(model, folder, pairs)  # now that nothing else can fail
    for file, program in programs.items():
        program.save(folder / file)


def answers(
    folder: Path, prompt: Sequence[int], new_tokens: int, *, baked: bool = False, never: Sequence[int] = ()
) -> tuple[Answer, Answer]:
    """What onnxruntime says on the CPU, with the prefix and without.

    Args:
        folder: What :func:`write` wrote.
        prompt: Token ids.
        new_tokens: How many are asked for.
        baked: Ask ``with_prefix.onnx`` for what is said with the prefix, and not ``model.onnx``.
        never: Tokens that are not chosen, such as the one that ends a text.
    """
    folder = Path(folder)
    bare = session_of(folder / BARE)
    with_prefix = (session_of(folder / BAKED), None) if baked else (bare, read_prefix(folder / PREFIX))
    asked = (with_prefix, (bare, None))
    first, second = (ask(one, prompt, new_tokens, past, never) for one, past in asked)
    return first, second


def verify(
    model: PreTrainedModel, folder: Path, prompt: Sequence[int], new_tokens: int = 16, *, baked: bool = False
) -> Verdict:
    """Whether onnxruntime says what ``model`` says, with its prefix and without.

    Args:
        model: A decoder-only model with the same prefix on it.
        folder: What :func:`write` wrote.
        prompt: Token ids of the model.
        new_tokens: How many to generate, each the likeliest that ends no text.
        baked: Run the graph with the prefix in it, and not the one that is fed with it.

    Returns:
        How far the program is from the model.

    Raises:
        ConfigError: If the prompt is empty.
        UnsupportedModelError: If the model is no decoder-only one that writes text.
        VerificationError: If it does not.
    """
    ours = answers_of(model, prompt, new_tokens)
    theirs = answers(folder, prompt, new_tokens, baked=baked, never=ends_of(model))
    return judge(f"{name} ({BAKED if baked else BARE})", ours, theirs)


def runs(folder: Path, **_: Any) -> list[dict[str, Any]]:
    """The options of :func:`verify` for each graph that was written."""
    return [{}, {"baked": True}] if (Path(folder) / BAKED).is_file() else [{}]


class Step(nn.Module):
    """One call of the decoder, with keys and values as plain tensors.

    Args:
        model: The bare decoder.
        prefix: Keys and values that stand in front of every past; none in the bare graph.
    """

    def __init__(self, model: nn.Module, prefix: Pairs) -> None:
        super().__init__()
        self.model = model
        self.places = internals.takes(model, "position_ids")
        self.tokens = prefix[0][0].shape[2] if prefix else 0
        for number, part in enumerate(part for pair in prefix for part in pair):
            self.register_buffer(f"prefix_{number}", part)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Logits ``(batch, length, vocabulary)``, then key and value of each layer, without the prefix."""
        if self.tokens:
            attention_mask = torch.cat([attention_mask.new_ones(len(input_ids), self.tokens), attention_mask], dim=1)
            past = [torch.cat([self._rows(number, part), part], dim=2) for number, part in enumerate(past)]
        # Every layer keeps all it is given, those with a sliding window too: their mask says what they see.
        cache = internals.cache_of(list(zip(past[::2], past[1::2], strict=True)))
        places = {"position_ids": positions(attention_mask, input_ids)} if self.places else {}
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **places
        )
        present = [part[:, :, self.tokens :] for pair in internals.pairs_in(found.past_key_values) for part in pair]
        return found.logits, *present

    def _rows(self, number: int, past: torch.Tensor) -> torch.Tensor:
        part: torch.Tensor = self.get_buffer(f"prefix_{number}")
        return part.expand(past.shape[0], -1, -1, -1)


def positions(attention_mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Where the tokens stand: padding is not counted, and the virtual tokens are."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]


def _graph(model: PreTrainedModel, step: Step, pairs: Pairs) -> Any:
    parts = [part for pair in pairs for part in pair]
    past = [part.new_zeros(BATCH, part.shape[1], PAST, part.shape[3]) for part in parts]
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long, device=model.device)
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.long, device=model.device)
    sizes = [{0: "batch", 1: "length"}, {0: "batch", 1: "past and length"}, [{0: "batch", 2: "past"} for _ in past]]
    names = ["input_ids", "attention_mask", *_names("past_key_values", len(past))]
    with disabled(model), as_it_was(step), internals.uncompiled_attention(model), torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            step,
            (ids, mask, past),
            dynamo=True,
            dynamic_shapes=tuple(sizes),
            input_names=names,
            output_names=["logits", *_names("present", len(past))],
            verbose=False,
        )
    return program


class _quiet(warnings.catch_warnings):  # noqa: N801 - reads as what it does
    """Without the exporter's warnings about itself and about sizes that have one name."""

    def __enter__(self) -> None:
        super().__enter__()
        for module in (r"torch\.", r"onnx", "copyreg"):
            warnings.filterwarnings("ignore", module=module)


def _names(stem: str, number: int) -> list[str]:
    return [f"{stem}.{part // 2}.{('key', 'value')[part % 2]}" for part in range(number)]


def session_of(file: Path) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        CheckpointError: If the file is damaged.
        EngineError: If onnxruntime is not installed.
    """
    start = needed("onnxruntime", "onnx").InferenceSession
    try:
        return start(str(file), providers=["CPUExecutionProvider"])
    # It may be damaged in many ways, and onnxruntime has an error for each.
    except Exception as error:
        raise CheckpointError(f"{str(file)!r} is damaged or no graph of ONNX: {error}") from error


def first_past(session: Any, prefix: Pairs | None, rows: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """What ``session`` gets as its past in the first call: the prefix, or nothing."""
    import numpy as np

    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
    if prefix is None:
        return {one.name: np.zeros((rows, one.shape[1], 0, one.shape[3]), kinds[one.type]) for one in inputs}
    parts = dict(zip(_names("past_key_values", len(inputs)), (part for pair in prefix for part in pair), strict=True))
    return {name: part.expand(rows, -1, -1, -1).numpy() for name, part in parts.items()}


def call(
    session: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], past: Mapping[str, np.ndarray[Any, Any]]
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Logits ``(batch, length, vocabulary)``, and the past of the next call."""
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
    return logits, dict(zip(past, present, strict=True))


def ask(session: Any, prompt: Sequence[int], new_tokens: int, prefix: Pairs | None, never: Sequence[int]) -> Answer:
    """What ``session`` says behind ``prefix`` as its first past, or behind nothing."""
    import numpy as np

    past, held = first_past(session, prefix), prefix[0][0].shape[2] if prefix else 0

    def step(unread: list[int]) -> torch.Tensor:
        nonlocal past, held
        held += len(unread)
        logits, past = call(session, np.array([unread], dtype=np.int64), np.ones((1, held), dtype=np.int64), past)
        return torch.from_numpy(logits[0, -1])

    return greedy(step, prompt, new_tokens, never)
