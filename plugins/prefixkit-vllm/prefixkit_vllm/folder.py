"""What one prefix is for vLLM: a folder with keys and values, and a description with its placeholder ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

DESCRIPTION = "vllm.json"
"""The file that says what the other is."""
PREFIX = "prefix.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What has to be known of a prefix before its numbers are read.

    Attributes:
        model_type: Of the base.
        hidden_size: Of the base.
        vocab_size: Of the base.
        placeholders: The ids that stand for the prefix at the beginning of a prompt, one for each virtual token.
        eos_token_ids: That end a text of the base.
        sha256: Of the file with keys and values.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    placeholders: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    sha256: str

    def as_json(self) -> bytes:
        """The content of :data:`DESCRIPTION`."""
        told = {"format": FORMAT, **asdict(self), "text_starts_at": len(self.placeholders)}
        return (json.dumps(told, indent=2) + "\n").encode()


def described(folder: str | Path) -> Description:
    """What the folder's description says.

    Raises:
        CheckpointError: If there is none, or of another format.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} has no {DESCRIPTION}; write a prefix for vLLM there first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("format", None) != FORMAT:
        raise CheckpointError(f"{str(path)!r} is of another format than {FORMAT}, which this version reads")
    del found["text_starts_at"]
    lists: dict[str, Any] = {name: tuple(found.pop(name)) for name in ("placeholders", "eos_token_ids")}
    return Description(**found, **lists)


def tensors(folder: str | Path, description: Description) -> dict[str, torch.Tensor]:
    """Keys and values: ``decoder.0.key (kv_heads, P, dim)``, ``decoder.0.value``, and so on.

    Raises:
        CheckpointError: If the file is missing, or not the one that is described.
    """
    from safetensors.torch import load

    path = Path(folder) / PREFIX
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != description.sha256:
        raise CheckpointError(f"{str(path)!r} is not the file that {DESCRIPTION} describes; write the prefix again")
    return load(content)


def check_apart(placeholders: Mapping[str, Sequence[int]], block: int | None = None) -> None:
    """Refuse prefixes that one prompt could mean, or whose keys vLLM's prefix caching could take for each other's.

    Args:
        placeholders: Of each prefix, by its name.
        block: How many tokens vLLM's prefix caching takes together; it is not known where nothing runs yet.

    Raises:
        ConfigError: If they are not apart.
    """
    for (one, first), (other, second) in combinations(placeholders.items(), 2):
        alike = common(first, second)
        if alike == min(len(first), len(second)):
            relation = "the same as" if len(first) == len(second) else "the beginning of, or begun by,"
            raise ConfigError(
                f"the placeholders of {one!r} are {relation} those of {other!r}, so that a prompt does not say which "
                "one it means; write one of them again with other placeholders="
            )
        if block is not None and alike >= block:
            raise ConfigError(
                f"the placeholders of {one!r} and {other!r} begin with the same {alike} ids, which vLLM's prefix "
                f"caching takes for the same text in blocks of {block}; write one of them again with other "
                "placeholders="
            )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids are the same before the first that is not."""
    same = [first == second for first, second in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)
