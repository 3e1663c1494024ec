"""Files of tensors: safetensors, and pickles that may hold nothing but data.

Pickles are read by ``torch.load(weights_only=True)``, which builds tensors and plain containers and runs no code of
the file's. What asks for anything else is refused, and so is every pickle before torch 2.6, where a file could run
code all the same (CVE-2025-32434).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors
import torch

from prefixkit.errors import CheckpointError

SAFE = ".safetensors"
UNPICKLES_SAFELY = (2, 6)
"""The first torch whose ``weights_only=True`` holds what it promises."""


class SafeTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file: Any = _open(path)
            self.names: tuple[str, ...] = tuple(self.file.keys())
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        try:
            value: torch.Tensor = self.file.get_tensor(name)
        except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: {name!r} cannot be read: {error}") from error
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read(path: Path) -> Mapping[str, Any]:
    """What the file holds, by name; of a pickle, perhaps not only tensors.

    Raises:
        CheckpointError: If it is damaged, holds no names, or holds more than data.
    """
    if path.suffix == SAFE:
        return SafeTensors(path)
    content = unpickle(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected tensors by name")
    return dict(content)


def unpickle(path: Path) -> object:
    """The data in a file of ``torch.save``.

    Raises:
        CheckpointError: If it is damaged, or holds more than data, or torch is too old to read it safely.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < UNPICKLES_SAFELY:
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} cannot read safely (CVE-2025-32434); install torch "
            f"{'.'.join(map(str, UNPICKLES_SAFELY))} or newer, or convert the file to safetensors"
        )
    try:
        with _lists_of_parameters():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, and nothing else is ever unpickled: {_first_line(error)}"
        ) from error


def first_of(folder: Path, *names: str) -> Path | None:
    """The first of these files that is in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _lists_of_parameters() -> AbstractContextManager[object]:
    """Allow ``ParameterList``, a container that Cartridges are saved in. It is data, and no method of it is called."""
    allowed: AbstractContextManager[object] = torch.serialization.safe_globals([torch.nn.ParameterList])
    return allowed


def _open(path: Path) -> Any:
    return safetensors.safe_open(path, framework="pt")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
