"""A prefix beside an exported graph, spoiled."""

from __future__ import annotations

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefixkit.serving.prefix_file import PREFIX


def spoil(folder, change):
    """Change the tensors of the file with the prefix; its header stays."""
    file = folder / PREFIX
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file(change(load_file(file)), file, header)
