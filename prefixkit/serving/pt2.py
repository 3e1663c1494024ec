"""torch.export: one graph with a static cache in it, whose first places hold the prefix.

The cache is a buffer of the graph. So the prefix is read from a file beside it when a text begins, and another prefix
of the same shape takes its place without exporting again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.as_it_was import as_it_was
from prefixkit.errors import CheckpointError, ConfigError, EngineError
from prefixkit.lifecycle import disabled
from prefixkit.prefixes import require
from prefixkit.serving.prefix_file import PREFIX, Pairs, prefix_of, read_prefix, write_prefix
from prefixkit.serving.verdict import Answer, Verdict, answers_of, ends_of, greedy, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

name = "pt2"
GRAPH = "model.pt2"
LENGTH = 3
"""Tokens of the call that is traced, whose number does not stay in the graph."""


def write(model: PreTrainedModel, folder: Path, *, max_cache_len: int = 512) -> None:
    """Write ``model.pt2``, the bare decoder with a static cache, and ``prefix.safetensors``, what to put into it.

    The graph takes ``input_ids (1, length)`` and gives ``logits (1, length, vocabulary)``; the cache goes on by itself.

    Args:
        model: A decoder-only model with a prefix.
        folder: Made if there is none.
        max_cache_len: Places for P virtual tokens and all tokens of the text.

    Raises:
        AttachmentError: If the model has no prefix.
        ConfigError: If ``max_cache_len`` leaves no room for a text.
        EngineError: If keys and values do not say it all.
        UnsupportedModelError: If the model attends to an encoder.
    """
    if not internals.static_layers_append():
        raise EngineError(
            f"in transformers {internals.VERSION} a static cache does not count by itself; use 5.5 or later"
        )
    tokens = require(model).attachment.config.num_virtual_tokens
    if max_cache_len <= tokens:
        raise ConfigError(
            f"max_cache_len is {max_cache_len}; it needs room for {tokens} virtual tokens and the text, "
            f"{tokens + 1} or more"
        )
    folder = Path(folder)
    pairs = prefix_of(model)
    step = Step(model, pairs, max_cache_len)
    ids = torch.ones(1, LENGTH, dtype=torch.long, device=model.device)
    # Nothing of a call may stay in the model, or in the buffers, that the graph starts with.
    with disabled(model), as_it_was(step), internals.uncompiled_attention(model), torch.no_grad():
        sizes = ({1: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(step, (ids,), dynamic_shapes=sizes, strict=False)
    write_prefix(model, folder, pairs)  # now that nothing else can fail
    torch.export.save(program, folder / GRAPH)


class Step(nn.Module):
    """One call of the decoder behind what the buffers ``key_0``, ``value_0``, ``held_0`` and so on hold.

    Args:
        model: The bare decoder.
        prefix: What they hold first.
        places: How many tokens they have room for.
    """

    def __init__(self, model: nn.Module, prefix: Pairs, places: int) -> None:
        super().__init__()
        self.model = model
        self.layers = len(prefix)
        for layer, pair in enumerate(prefix):
            for part, rows in zip(("key", "value"), pair, strict=True):
                room = rows.new_zeros(1, rows.shape[1], places - rows.shape[2], rows.shape[3])
                self.register_buffer(f"{part}_{layer}", torch.cat([rows, room], dim=2))
            self.register_buffer(f"held_{layer}", torch.tensor(pair[0].shape[2], device=pair[0].device))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits ``(1, length, vocabulary)``."""
        # The buffers are looked up here, while the call is traced: a cache made before would be a constant of the
        # graph, and would lose the prefix.
        parts = [
            (self.get_buffer(f"key_{layer}"), self.get_buffer(f"value_{layer}"), self.get_buffer(f"held_{layer}"))
            for layer in range(self.layers)
        ]
        cache = internals.static_cache_over(parts)
        logits: torch.Tensor = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
        return logits


class Program:
    """A ``model.pt2`` in this process.

    Example::

        program = Program(folder / "model.pt2")
        program.start(read_prefix(folder / "prefix.safetensors"))
        logits = program(torch.tensor([[11, 12, 13]]))
        logits = program(logits[:, -1:].argmax(-1))

    Args:
        file: What :func:`write` wrote.

    Raises:
        CheckpointError: If it is damaged.
    """

    def __init__(self, file: Path) -> None:
        try:
            self.module = torch.export.load(file).module()
        # It may be damaged in many ways, and torch has an error for each.
        except Exception as error:
            raise CheckpointError(f"{str(file)!r} is damaged or no program of torch.export: {error}") from error
        self.buffers = dict(self.module.named_buffers())
        self.layers = sum(place.startswith("held_") for place in self.buffers)
        self.places: int = self.buffers["key_0"].shape[2]

    def start(self, prefix: Pairs | None) -> None:
        """Begin a text behind ``prefix``, or behind nothing.

        Raises:
            CheckpointError: If it has other layers or heads than the graph.
        """
        if prefix is not None and len(prefix) != self.layers:
            raise CheckpointError(f"this prefix has {len(prefix)} layers, and the graph {self.layers}")
        for layer in range(self.layers):
            places = [self.buffers[f"{part}_{layer}"] for part in ("key", "value")]
            tokens = self._put(places, prefix[layer]) if prefix is not None else 0
            for place in places:
                place[:, :, tokens:] = 0
            self.buffers[f"held_{layer}"].fill_(tokens)

    @staticmethod
    def _put(places: Sequence[torch.Tensor], pair: Sequence[torch.Tensor]) -> int:
        tokens = pair[0].shape[2]
        for place, part in zip(places, pair, strict=True):
            fits = place[:, :, :tokens]
            if fits.shape != part.shape:
                raise CheckpointError(f"this prefix has {tuple(part.shape)} where the graph takes {tuple(fits.shape)}")
            fits.copy_(part)
        return tokens

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits ``(1, length, vocabulary)`` of what comes next in the text."""
        logits: torch.Tensor = self.module(input_ids)
        return logits


def answers(
    folder: Path, prompt: Sequence[int], new_tokens: int, *, never: Sequence[int] = ()
) -> tuple[Answer, Answer]:
    """What the graph says, with the prefix and without.

    Args:
        folder: What :func:`write` wrote.
        prompt: Token ids.
        new_tokens: How many are asked for.
        never: Tokens that are not chosen, such as the one that ends a text.

    Raises:
        CheckpointError: If what was written is damaged.
        ConfigError: If the text does not fit into the graph's cache.
    """
    program, prefix = Program(Path(folder) / GRAPH), read_prefix(Path(folder) / PREFIX)
    tokens = prefix[0][0].shape[2]
    needed = tokens + len(prompt) + new_tokens
    if needed > program.places:
        raise ConfigError(
            f"the graph has {program.places} places, and {tokens} virtual tokens, {len(prompt)} of the prompt and "
            f"{new_tokens} new ones need {needed}; ask for fewer, or write it with a larger max_cache_len"
        )
    with_prefix = ask(program, prefix, prompt, new_tokens, never)
    return with_prefix, ask(program, None, prompt, new_tokens, never)


def verify(model: PreTrainedModel, folder: Path, prompt: Sequence[int], new_tokens: int = 16) -> Verdict:
    """Whether the graph says what ``model`` says, with its prefix and without.

    Args:
        model: A decoder-only model with the same prefix on it.
        folder: What :func:`write` wrote.
        prompt: Token ids of the model.
        new_tokens: How many to generate, each the likeliest that ends no text.

    Returns:
        How far the program is from the model.

    Raises:
        ConfigError: If the prompt is empty. Or if the text does not fit into the graph's cache.
        UnsupportedModelError: If the model is no decoder-only one that writes text.
        VerificationError: If it does not.
    """
    ours = answers_of(model, prompt, new_tokens)
    return judge(name, ours, answers(folder, prompt, new_tokens, never=ends_of(model)))


def runs(_: Path, **__: Any) -> list[dict[str, Any]]:
    """The graph is run once."""
    return [{}]


def ask(program: Program, prefix: Pairs | None, prompt: Sequence[int], new_tokens: int, never: Sequence[int]) -> Answer:
    """What the graph says behind ``prefix`` or nothing."""
    program.start(prefix)
    return greedy(lambda unread: program(torch.tensor([unread]))[0, -1], prompt, new_tokens, never)
