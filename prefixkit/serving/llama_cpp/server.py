"""The prefix in a running llama-server, asked over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from prefixkit.errors import ConfigError, EngineError
from prefixkit.serving.llama_cpp.running import described
from prefixkit.serving.verdict import Answer

SLOT = 0
PATIENCE = 600.0
"""Seconds that an answer may take."""


class LlamaServer:
    """A llama-server.

    Args:
        address: Such as ``"http://127.0.0.1:8080"``.

    Raises:
        ConfigError: If it is no address of that kind.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"the address of a llama-server is {address!r}; write it as http://127.0.0.1:8080")
        self.address = address.rstrip("/")

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        """What the server says.

        Raises:
            EngineError: If it does not answer, or answers with an error.
        """
        content = json.dumps(fields).encode()
        request = Request(self.address + path, content, {"Content-Type": "application/json"})  # noqa: S310 - checked
        try:
            with urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
                found: dict[str, Any] = json.load(answer)
                return found
        except HTTPError as error:
            why = error.read().decode(errors="replace")[:300]
            raise EngineError(f"llama-server answers {path} with {error.code}: {why}") from error
        except (URLError, OSError, ValueError) as error:
            raise EngineError(f"no llama-server answers at {self.address}: {error}") from error

    def restore(self, folder: Path, slot: int = SLOT) -> list[int]:
        """Put the prefix into a slot, from the file that fits the server's cache.

        Args:
            folder: What :func:`prefixkit.serving.llama_cpp.write` wrote, the server's ``--slot-save-path``.
            slot: Which.

        Returns:
            The placeholder ids, with which the prompt has to begin.

        Raises:
            EngineError: If the server takes none of the files.
        """
        description = described(folder)
        placeholders = list(description["placeholders"])
        refused = []
        for file in description["files"]:
            try:
                found = self.post(f"/slots/{slot}?action=restore", filename=file)
            except EngineError as error:
                refused.append(f"{file}: {error}")
                continue
            if found.get("n_restored") != len(placeholders):
                raise EngineError(f"llama-server restored {found} from {file}, which has {len(placeholders)} tokens")
            return placeholders
        raise EngineError(
            f"llama-server takes no file of {str(folder)!r}; start it with --slot-save-path {folder} and a cache of "
            f"one of these kinds. {'; '.join(refused)}"
        )

    def ask(self, prompt: Sequence[int], new_tokens: int, vocabulary: int, slot: int = SLOT) -> Answer:
        """What the server says to ``prompt``: the likeliest tokens, none of which ends the text.

        The answer's logits are log-probabilities.
        """
        said = self.post(
            "/completion",
            prompt=list(prompt),
            id_slot=slot,
            n_predict=new_tokens,
            n_probs=vocabulary,
            temperature=-1.0,  # the likeliest, and the probabilities are of the plain logits
            ignore_eos=True,
            cache_prompt=True,
        )
        steps = said.get("completion_probabilities") or []
        if len(steps) != new_tokens:
            raise EngineError(f"{new_tokens} tokens were asked for, and llama-server gave {len(steps)}")
        told = {one["id"]: one["logprob"] for one in steps[0]["top_logprobs"]}
        logits = torch.full((max(told) + 1,), -torch.inf)  # a converter may leave out the last ids, which are no tokens
        for token, chance in told.items():
            logits[token] = chance
        return Answer(logits, tuple(step["id"] for step in steps))


def answers(
    folder: Path, prompt: Sequence[int], new_tokens: int, *, server: str, vocabulary: int
) -> tuple[Answer, Answer]:
    """What a llama-server says to ``prompt`` with the prefix, and without it.

    Args:
        folder: What :func:`prefixkit.serving.llama_cpp.write` wrote.
        prompt: Token ids of the model, without placeholders.
        new_tokens: How many to generate.
        server: Its address.
        vocabulary: How many tokens there are.
    """
    program = LlamaServer(server)
    without = program.ask(prompt, new_tokens, vocabulary)
    placeholders = program.restore(folder)  # at once before it is needed: an idle slot may be cleared
    return program.ask([*placeholders, *prompt], new_tokens, vocabulary), without
