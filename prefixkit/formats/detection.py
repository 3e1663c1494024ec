"""Which format a folder or a file is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.assembly import stacks_of
from prefixkit.checkpoint_files import TENSOR_FILE, read_json, written_by_prefixkit
from prefixkit.discovery import installed
from prefixkit.errors import CheckpointError, ConfigError
from prefixkit.formats import adapterhub, cartridges, p_tuning_v2, peft, prefix_tuning_2021, tensor_files
from prefixkit.formats.found import Found, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.adapter import Adapter

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".bin", ".pt", ".pth", tensor_files.SAFE)
KNOWN = "a prefix of prefixkit, PEFT, AdapterHub, the 2021 code of prefix tuning, P-tuning v2 or Cartridges"


def find(path: Path, model: PreTrainedModel, adapter: Adapter | None) -> Found | None:
    """The prefix that another library wrote to ``path``; ``None`` where there is no such thing, or one of our own.

    Raises:
        CheckpointError: If it is damaged, for another model, or in no format that is known.
    """
    file = None if (path / TENSOR_FILE).is_file() else telling_file(path)
    if file is None:
        return None
    adapter = adapter or installed().adapter_for(str(model.config.model_type))
    target = Target(model=model, stacks=tuple(stacks_of(model, adapter)), path=path)
    try:
        return _read(file, target)
    # What a format has not foreseen of a damaged file: sizes that no memory holds, or kinds that do not add up.
    except (ConfigError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read as {KNOWN}: {error}") from error


def telling_file(path: Path) -> Path | None:
    """The file that tells the format of another library; ``None`` where there is none.

    Raises:
        CheckpointError: If there are several.
    """
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    if not path.is_dir():
        return None
    file = tensor_files.first_of(path, peft.CONFIG_FILE, *WHOLE_FILES)
    cartridge = sorted(path.glob("*.pt"))
    if file is None and len(cartridge) > 1:
        raise CheckpointError(
            f"{str(path)!r} holds {', '.join(name.name for name in cartridge)}; pass the path of the one to load"
        )
    return file or next(iter(cartridge), None)


def _read(file: Path, target: Target) -> Found:
    if file.name == peft.CONFIG_FILE:
        document = read_json(file)
        if "peft_type" in document:
            return peft.read(file.parent, document, target)
        return adapterhub.read(file.parent, document, target)
    content = tensor_files.read(file)
    if cartridges.is_here(content):
        return cartridges.read(content, target)
    if p_tuning_v2.is_here(content):
        return p_tuning_v2.read(content, _settings(file), target)
    if prefix_tuning_2021.is_here(content):
        return prefix_tuning_2021.read(content, _settings(file), target)
    if file.suffix == tensor_files.SAFE and written_by_prefixkit(file):
        raise target.damaged(f"prefixkit wrote {file.name}, and reads the folder of a checkpoint, with {TENSOR_FILE}")
    names = ", ".join(map(repr, sorted(content)[:3])) or "nothing"
    raise target.damaged(f"{file.name} holds {names}, which is not {KNOWN}")


def _settings(file: Path) -> Mapping[str, Any]:
    """The ``config.json`` beside the tensors, if there is one."""
    beside = file.parent / "config.json"
    return read_json(beside) if beside.is_file() else {}
