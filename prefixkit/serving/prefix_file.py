"""The plain file of keys and values beside an exported graph, and what a target needs of packages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from prefixkit.checkpoint_files import read_header
from prefixkit.errors import CheckpointError, EngineError, UnsupportedModelError
from prefixkit.exporting import HEADER, export
from prefixkit.formats.tensor_files import SafeTensors
from prefixkit.native_cache import to_cache
from prefixkit.prefixes import require

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

PREFIX = "prefix.safetensors"
"""What :func:`prefixkit.export` writes, with keys for a text that starts behind them."""

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by the layer, each ``(1, kv_heads, tokens, dim)``."""


def needed(package: str, extra: str) -> Any:
    """The package, imported.

    Raises:
        EngineError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EngineError(f"{package} is not installed; pip install 'prefixkit[{extra}]'") from error


def check_head(attachment: Attachment, program: str) -> None:
    """Refuse a head that trained with the prefix, where ``program`` has the base's.

    Raises:
        EngineError: If there is one.
    """
    if attachment.config.head:
        raise EngineError(
            f"the head ({', '.join(attachment.config.head)}) trained with the prefix, and {program} has the base's; "
            "train with head=False to serve it there"
        )


def prefix_of(model: PreTrainedModel) -> Pairs:
    """The prefix of a decoder-only ``model``, with keys for a text that starts behind it.

    Raises:
        AttachmentError: If the model has no prefix.
        EngineError: If keys and values in front of the text do not say it all, as where a head trained with them.
        UnsupportedModelError: If the model has an encoder.
    """
    check_head(require(model).attachment, "the graph")
    pairs: Any = to_cache(model, kind="tuple")
    if model.config.is_encoder_decoder or any(len(pair) > 2 for pair in pairs):
        raise UnsupportedModelError(
            f"{type(model).__name__} attends to an encoder, and a graph is written of decoder-only models; hand over "
            "its keys and values with prefixkit.export, or its cache with prefixkit.to_cache"
        )
    return [(key, value) for key, value in pairs]


def write_prefix(model: PreTrainedModel, folder: Path, pairs: Pairs) -> None:
    """Write the prefix of ``model`` into ``folder``, in the dtype of ``pairs``, which :func:`prefix_of` gave.

    Raises:
        CheckpointError: If that would replace a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export(model, folder / PREFIX, positions="shift", dtype=pairs[0][0].dtype)


def read_prefix(file: Path) -> Pairs:
    """Keys and values by the layer, each ``(1, kv_heads, tokens, dim)``, from a file of a decoder-only model.

    Args:
        file: What :func:`prefixkit.export` wrote, alone or in a program's folder.

    Raises:
        CheckpointError: If the file is damaged, or no export of a decoder-only model.
    """
    header = read_header(file, HEADER)
    names = [site["name"] for site in header["sites"]]
    if any(site["stack"] != "decoder" for site in header["sites"]):
        raise CheckpointError(f"{str(file)!r} has more than a decoder's prefix ({', '.join(names)})")
    tensors = SafeTensors(file)
    return [(tensors[f"{name}.key"][None], tensors[f"{name}.value"][None]) for name in names]
