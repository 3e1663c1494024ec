"""Which prefix a prompt means, and which requests cannot be served with theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefixkit_vllm.folder import check_apart, common

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Texts:
    """The placeholders of all prefixes.

    Args:
        placeholders: By the prefix's name.
        block: How many tokens vLLM's prefix caching takes together.

    Raises:
        ConfigError: If two prefixes cannot be told apart.
    """

    def __init__(self, placeholders: Mapping[str, Sequence[int]], block: int) -> None:
        check_apart(placeholders, block)
        self._names = {tuple(ids): name for name, ids in placeholders.items()}
        self._lengths = sorted({len(ids) for ids in self._names})
        self._block = block

    def prefix_of(self, prompt: Sequence[int] | None) -> str | None:
        """The name of the prefix whose placeholders a prompt begins with."""
        if prompt is None:  # it consists of embeddings
            return None
        beginnings = (tuple(prompt[:length]) for length in self._lengths)
        return next((self._names[ids] for ids in beginnings if ids in self._names), None)

    def refuses(self, request: Request) -> str:
        """Why a request is not served, or an empty text."""
        prompt, asked = request.prompt_token_ids, (request.kv_transfer_params or {}).get("prefix")
        prefix = self.prefix_of(prompt)
        if asked is not None and asked != prefix:
            return self._not_as_asked(asked, prefix)
        if prefix is None:
            return self._begun(prompt or ())
        if request.num_prompt_tokens <= len(self._ids(prefix)):
            return f"there is no text behind the placeholders of {prefix!r}"
        if request.skip_reading_prefix_cache:
            return (
                f"it asks for log-probabilities of its prompt, for which vLLM reads the placeholders of {prefix!r} as "
                "words; ask without prompt_logprobs, and without echo where logprobs are asked for"
            )
        return ""

    def _ids(self, name: str) -> tuple[int, ...]:
        return next(ids for ids, other in self._names.items() if other == name)

    def _not_as_asked(self, asked: Any, prefix: str | None) -> str:
        known = ", ".join(sorted(self._names.values()))
        if asked not in self._names.values():
            return f"it asks for the prefix {asked!r}, and there is none of that name; there are: {known}"
        begins = f"those of {prefix!r}" if prefix else "no placeholders"
        return f"it asks for the prefix {asked!r}, and its prompt begins with {begins}; was it truncated?"

    def _begun(self, prompt: Sequence[int]) -> str:
        """A whole block of placeholders read as words would be kept, and taken for the prefix's by later requests."""
        for ids, name in self._names.items():
            alike = common(ids, prompt)
            if alike >= self._block:
                return f"its prompt begins with {alike} of the {len(ids)} placeholders of {name!r}, and not with all"
        return ""
