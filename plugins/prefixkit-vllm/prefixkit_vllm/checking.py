"""Whether vLLM says what the model says: it runs in a process of its own, and in an environment of its own if asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.errors import EngineError
from prefixkit.serving.verdict import Answer, Verdict, answers_of, ends_of, judge
from prefixkit_vllm import name
from prefixkit_vllm.naming import prompt as prompt_of, transfer_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

LAST_LINES = 12
"""Of what a process said that came to nothing."""


def answers(
    folder: str | Path,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    base: str | Path,
    never: Sequence[int] = (),
    python: str | Path = sys.executable,
    **engine: Any,
) -> tuple[Answer, Answer]:
    """What vLLM says to ``prompt`` with the prefix, and without it.

    Args:
        folder: What :func:`prefixkit_vllm.write` wrote.
        prompt: Token ids, without placeholders.
        new_tokens: How many are asked for.
        base: Folder or name of the base, which vLLM loads.
        never: Tokens that are not chosen, such as the one that ends a text.
        python: Of the environment that has vLLM and prefixkit-vllm.
        engine: Options of ``vllm.LLM``, such as ``dtype="float32"``.

    Raises:
        CheckpointError: If the folder has no prefix.
        ConfigError: If the prompt is empty.
        EngineError: If vLLM does not start, or refuses.
    """
    asked = {
        "engine": {"model": str(base), "kv_transfer_config": transfer_config({"prefix": folder}), **engine},
        "prompts": [prompt_of(folder, prompt), list(prompt)],
        "new_tokens": new_tokens,
        "never": list(never),
    }
    said = _said(asked, python)
    with_prefix, without = (Answer(said[f"{one}.logits"], tuple(said[f"{one}.tokens"].tolist())) for one in (0, 1))
    return with_prefix, without


def verify(
    model: PreTrainedModel,
    folder: str | Path,
    prompt: Sequence[int],
    new_tokens: int = 16,
    *,
    base: str | Path,
    python: str | Path = sys.executable,
    **engine: Any,
) -> Verdict:
    """Whether vLLM says what ``model`` says, with its prefix and without.

    Args:
        model: A decoder-only model with the same prefix on it; vLLM gets its dtype.
        folder: What :func:`prefixkit_vllm.write` wrote.
        prompt: Token ids of the model, without placeholders.
        new_tokens: How many to generate, each the likeliest that ends no text.
        base: Folder or name of the base, which vLLM loads.
        python: Of the environment that has vLLM and prefixkit-vllm.
        engine: Options of ``vllm.LLM``.

    Returns:
        How far vLLM is from the model.

    Raises:
        ConfigError: If the prompt is empty.
        EngineError: If vLLM does not start, or refuses.
        UnsupportedModelError: If the model is no decoder-only one that writes text.
        VerificationError: If it does not.
    """
    engine = {"dtype": str(model.dtype).removeprefix("torch."), **engine}
    ours = answers_of(model, prompt, new_tokens)
    theirs = answers(folder, prompt, new_tokens, base=base, never=ends_of(model), python=python, **engine)
    return judge(name, ours, theirs)


def runs(_: Path, **__: Any) -> list[dict[str, Any]]:
    """The folder is run once."""
    return [{}]


def _said(asked: dict[str, Any], python: str | Path) -> Mapping[str, torch.Tensor]:
    """Logits and tokens of each prompt, by its number.

    Raises:
        EngineError: If vLLM comes to nothing.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "question.json"), Path(scratch, "answer.safetensors")
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [str(python), "-m", "prefixkit_vllm.asking", str(question), str(answer)]
        there = {**os.environ, "PYTHONSAFEPATH": "1"}  # a folder "vllm" here is not the package
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=there)  # noqa: S603  our own
        if done.returncode or not answer.is_file():
            raise EngineError(f"vLLM, run by {python}, came to nothing:\n{_last_lines(done.stdout + done.stderr)}")
        return load_file(answer)


def _last_lines(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])
