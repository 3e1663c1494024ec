"""Run by :mod:`prefixkit_vllm.checking` where vLLM is: ``python -m prefixkit_vllm.asking QUESTION ANSWER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm import LLM

SETTINGS = {"enforce_eager": True, "skip_tokenizer_init": True, "logprobs_mode": "raw_logits", "max_logprobs": -1}
"""Nothing is compiled for two prompts, which are ids; what is shown are the logits of all tokens, as they are."""


def answer(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits of the first new token, and the new tokens, of each prompt."""
    from vllm import LLM

    prompts, new_tokens = asked["prompts"], asked["new_tokens"]
    room = max(map(len, prompts)) + new_tokens + 1
    llm = LLM(**{**SETTINGS, "max_model_len": room, **asked["engine"]})
    return said_by(llm, prompts, new_tokens, asked["never"])


def said_by(llm: LLM, prompts: Sequence[list[int]], new_tokens: int, never: list[int]) -> dict[str, torch.Tensor]:
    """What a running engine says, all prompts in one batch."""
    import torch
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": new_tokens, "min_tokens": new_tokens, "stop_token_ids": never}
    settings = SamplingParams(**greedy, detokenize=False, logprobs=-1)
    found: dict[str, torch.Tensor] = {}
    for number, one in enumerate(
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    ):
        (output,) = one.outputs
        if output.finish_reason == "error":
            raise RuntimeError("vLLM has refused a request; its log says why")
        first = output.logprobs[0]
        found[f"{number}.tokens"] = torch.tensor(output.token_ids)
        found[f"{number}.logits"] = torch.tensor([first[token].logprob for token in range(len(first))])
    return found


def main(question: str, into: str) -> None:
    """Answer the question in a file into another one."""
    # One process, which ends with the answer, and says only what is wrong.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from safetensors.torch import save_file

    save_file(answer(json.loads(Path(question).read_text(encoding="utf-8"))), into)


if __name__ == "__main__":
    main(*sys.argv[1:])
