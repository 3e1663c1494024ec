"""The two files of a checkpoint.

``prefix.safetensors`` holds the numbers and, in its header, the whole configuration; it is complete
by itself. ``prefix_config.json`` repeats the configuration where people can read it, and change a
policy. Each file is replaced in one step, the numbers first, and both carry the same ``save_id``:
where the ids differ, after a crash between the two, the header is believed; else the JSON file.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from prefixkit.errors import CheckpointError, ConfigError, some
from prefixkit.json_object import json_object
from prefixkit.prefix_config import PrefixConfig

CONFIG_FILE = "prefix_config.json"
TENSOR_FILE = "prefix.safetensors"
ADAPTER_FILE = "adapter_config.json"
"""By which a folder of PEFT or AdapterHub is known."""
HEADER = "prefixkit"
FORMAT = 1


def write(directory: Path, config: PrefixConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write both files, each in one step.

    Raises:
        CheckpointError: If ``directory`` is a file.
    """
    document = {"format": FORMAT, "save_id": uuid.uuid4().hex, **config.to_dict()}
    write_files(
        directory, TENSOR_FILE, tensors, CONFIG_FILE, document, metadata={HEADER: json.dumps(document, indent=2)}
    )


def write_files(
    directory: Path,
    tensor_file: str,
    tensors: Mapping[str, torch.Tensor],
    config_file: str,
    document: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and a JSON file into a folder, each in one step.

    Raises:
        CheckpointError: If ``directory`` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"cannot save to {str(directory)!r}: it is a file; name a folder")
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / tensor_file, tensors, metadata or {})
    replace_file(directory / config_file, (json.dumps(document, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file in one step."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    replace_file(path, safetensors.torch.save(plain, metadata={"format": "pt", **metadata}))


class OwnCheckpoint:
    """A checkpoint of prefixkit.

    Args:
        directory: Its folder.

    Raises:
        CheckpointError: If there is none, it is damaged, or another format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: PrefixConfig = read_config(directory)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name, without reading their numbers."""
        return read_shapes(self.directory)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, on the CPU."""
        return read_tensors(self.directory)


def read_config(directory: Path) -> PrefixConfig:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: If there is none, it is damaged, or another format.
    """
    path = directory / TENSOR_FILE
    if not path.is_file():
        raise no_checkpoint(directory)
    header = read_header(path)
    beside = directory / CONFIG_FILE
    if beside.is_file():
        document = read_json(beside)
        if document.get("save_id") == header.get("save_id"):
            header = document
    version = header.pop("format", None)
    header.pop("save_id", None)
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version!r}; this prefixkit reads {FORMAT}. Install a newer prefixkit"
        )
    try:
        return PrefixConfig.from_dict(header)
    except ConfigError as error:
        raise CheckpointError(f"the configuration of {str(directory)!r} cannot be used: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: If it holds something else.
    """
    return json_object(path.read_text(encoding="utf-8", errors="replace"), str(path), CheckpointError)


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by name, without reading their numbers."""
    path = directory / TENSOR_FILE
    with _open(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, on the CPU."""
    path = directory / TENSOR_FILE
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def written_by_prefixkit(path: Path) -> bool:
    """Whether a safetensors file carries our mark."""
    with _open(path) as file:
        return HEADER in (file.metadata() or {})


def is_checkpoint(path: Path) -> bool:
    """Whether there is a file at ``path`` that :func:`prefixkit.save` wrote."""
    try:
        return path.is_file() and written_by_prefixkit(path)
    except CheckpointError:
        return False  # of another kind, or damaged


def read_header(path: Path, entry: str = HEADER) -> dict[str, Any]:
    """The JSON object in an entry of a safetensors file's metadata.

    Raises:
        CheckpointError: If the file is damaged, or has no such entry.
    """
    with _open(path) as file:
        metadata = file.metadata() or {}
    if entry not in metadata:
        raise CheckpointError(f"{path} was not written by prefixkit: its header has no {entry!r} entry")
    return json_object(metadata[entry], f"the header of {path}", CheckpointError)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def no_checkpoint(directory: Path) -> CheckpointError:
    """An error, to be raised: nothing here can be read."""
    missing = f"no {TENSOR_FILE} in {str(directory)!r}"
    if not directory.is_dir():
        return CheckpointError(f"{missing}: it is no folder")
    inside = _checkpoints_inside(directory)
    hint = f"; its sub-folders hold checkpoints ({some(inside)}): pass the path of one" if inside else ""
    return CheckpointError(f"{missing}; nor anything of another library that prefixkit reads{hint}")


def _checkpoints_inside(directory: Path) -> list[str]:
    """Sub-folders in which ``Trainer`` left a checkpoint, or PEFT an adapter that has a name."""
    return sorted({file.parent.name for name in (TENSOR_FILE, ADAPTER_FILE) for file in directory.glob(f"*/{name}")})


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, and put it in its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
