"""The plain file of keys and values, and whether it says all of the prefix.

Any program may read the file. Here the bare model of transformers runs it, which gets the file's keys and values as its
first past, and nothing else of the prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prefixkit import transformers_internals as internals
from prefixkit.cache_engine import check_cacheable, without_the_other
from prefixkit.checkpoint_files import read_header
from prefixkit.errors import CheckpointError, EngineError
from prefixkit.exporting import HEADER, export as write
from prefixkit.lifecycle import disabled
from prefixkit.prefixes import require
from prefixkit.serving.prefix_file import Pairs, check_head, read_prefix
from prefixkit.serving.verdict import Answer, Verdict, answers_of, ends_of, greedy, judge

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

__all__ = ["answers", "name", "runs", "verify", "write"]

name = "kv"


def answers(model: PreTrainedModel, file: Path, prompt: Sequence[int], new_tokens: int) -> tuple[Answer, Answer]:
    """What the bare model says behind the keys and values of ``file``, and behind nothing.

    Args:
        model: A decoder-only model with a prefix, which is disabled meanwhile.
        file: What :func:`prefixkit.export` wrote.
        prompt: Token ids.
        new_tokens: How many are asked for.

    Raises:
        CheckpointError: If the file is damaged, or of a model with other layers.
        EngineError: If the file asks for positions that this model cannot be told.
    """
    pairs = read_prefix(file)
    start = read_header(file, HEADER)["text_starts_at"].get("decoder", 0)
    _check(model, file, pairs, start)
    with disabled(model):
        return _ask(model, pairs, start, prompt, new_tokens), _ask(model, [], 0, prompt, new_tokens)


def verify(model: PreTrainedModel, file: Path, prompt: Sequence[int], new_tokens: int = 16) -> Verdict:
    """Whether the bare model behind the file says what ``model`` says, with its prefix and without.

    Args:
        model: A decoder-only model with the same prefix on it.
        file: What :func:`prefixkit.export` wrote.
        prompt: Token ids of the model.
        new_tokens: How many to generate, each the likeliest that ends no text.

    Returns:
        How far the program is from the model.

    Raises:
        ConfigError: If the prompt is empty.
        EngineError: If the bare model cannot be given this prefix, such as one that is pinned in sliding windows.
        UnsupportedModelError: If the model is no decoder-only one that writes text.
        VerificationError: If it does not.
    """
    attachment = require(model).attachment
    check_head(attachment, "the bare model")
    try:
        check_cacheable(attachment)
    except EngineError as error:
        raise EngineError(f"the bare model cannot run this file: {without_the_other(error)}") from error
    ours = answers_of(model, prompt, new_tokens)
    return judge(name, ours, answers(model, file, prompt, new_tokens))


def runs(_: Path, **__: Any) -> list[dict[str, Any]]:
    """The file is run once."""
    return [{}]


def _check(model: PreTrainedModel, file: Path, pairs: Pairs, start: int) -> None:
    sites = require(model).attachment.layout.sites
    wanted = [(1, site.kv_heads, site.key_dim) for site in sites]
    found = [(len(key), key.shape[1], key.shape[3]) for key, _ in pairs]
    if wanted != found:
        raise CheckpointError(
            f"{str(file)!r} has {len(found)} layers with (1, kv_heads, key_dim) {sorted(set(found))}, and the model "
            f"{len(wanted)} with {sorted(set(wanted))}"
        )
    if start != pairs[0][0].shape[2] and not internals.takes(model, "position_ids"):
        raise EngineError(
            f"the text stands at {start} in {str(file)!r}, and {type(model).__name__} takes no position_ids, with "
            "which it could be told"
        )


def _ask(model: PreTrainedModel, pairs: Pairs, start: int, prompt: Sequence[int], new_tokens: int) -> Answer:
    past: Any = internals.cache_of([(key.to(model.device), value.to(model.device)) for key, value in pairs])
    read = 0

    @torch.no_grad()
    def step(unread: list[int]) -> torch.Tensor:
        nonlocal past, read
        where = torch.arange(start + read, start + read + len(unread), device=model.device)[None]
        places = {"position_ids": where} if internals.takes(model, "position_ids") else {}
        found = model(torch.tensor([unread], device=model.device), past_key_values=past, use_cache=True, **places)
        past, read = found.past_key_values, read + len(unread)
        logits: torch.Tensor = found.logits[0, -1].float().cpu()
        return logits

    return greedy(step, prompt, new_tokens, ends_of(model))
