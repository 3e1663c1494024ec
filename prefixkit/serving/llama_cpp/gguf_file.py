"""The GGUF that llama.cpp runs: is it this model, and in which order has it the numbers of a key?

Converters reorder the rows of some models' key projections, so that the two numbers that a rotation turns stand side
by side. A key of a prefix has to be reordered in the same way, or llama.cpp turns other pairs and answers wrongly,
without a word. Which way it is, the weights themselves say, whatever the model is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from prefixkit.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from prefixkit.adapter import Site

FAR = 0.5
"""Relative error from which weights are others; those of the coarsest types of GGUF are off by about 0.3."""
NORMAL = 1
"""The type of a token that is a piece of text, in a GGUF's vocabulary."""


def _as_they_are(key: torch.Tensor) -> torch.Tensor:
    return key


def _neighbours(key: torch.Tensor) -> torch.Tensor:
    """Number i of the first half, then number i of the second, for each i."""
    side_by_side: torch.Tensor = key.unflatten(-1, (2, -1)).transpose(-1, -2)
    return side_by_side.flatten(-2)


ORDERS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "halves": _as_they_are,
    "neighbours": _neighbours,
}
"""The orders that a head's numbers may have in a GGUF, as functions of the model's own, ``(..., key_dim)``."""


class GgufFile:
    """A GGUF, opened but not loaded.

    Args:
        path: The file.

    Raises:
        CheckpointError: If there is none, or it is damaged.
        ImportError: If the package ``gguf`` is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "a GGUF is read by the package gguf, which is missing: pip install 'prefixkit[llama-cpp]', or gguf"
            ) from error
        if not path.is_file():
            raise CheckpointError(f"there is no file {str(path)!r}; gguf= is the GGUF that llama.cpp will run")
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # whatever a damaged file makes of it
            raise CheckpointError(f"{str(path)!r} is no whole GGUF: {type(error).__name__}: {error}") from error
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self._field("general.architecture", ""))

    def number(self, name: str) -> int:
        """A number about the architecture, such as ``block_count``; 0 if it is not there."""
        return int(self._field(f"{self.architecture}.{name}", 0))

    def words(self) -> list[int]:
        """The ids of the tokens that are text, in a vocabulary that tells them from others; else all."""
        tokens = self._field("tokenizer.ggml.tokens", ())
        kinds = self._field("tokenizer.ggml.token_type", ())
        count = len(tokens) or self.number("vocab_size")
        return [index for index, kind in enumerate(kinds) if kind == NORMAL] or list(range(count))

    def weight(self, name: str) -> torch.Tensor:
        """A weight ``(rows, columns)``, dequantized.

        Raises:
            EngineError: If there is none.
        """
        if name not in self._tensors:
            split = "; it is one of several files: merge them (llama-gguf-split --merge)" if self._is_split() else ""
            raise EngineError(f"{self.path.name!r} has no {name!r}{split}")
        tensor = self._tensors[name]
        return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).astype("float32"))

    def _is_split(self) -> bool:
        return int(self._field("split.count", 0)) > 1

    def _field(self, name: str, default: Any) -> Any:
        field = self._reader.get_field(name)
        return default if field is None else field.contents()


def order_of(file: GgufFile, model: nn.Module, sites: Sequence[Site]) -> str:
    """In which of :data:`ORDERS` the GGUF has the numbers of the model's keys.

    Raises:
        EngineError: If its key projections are not those of the model, in any known order, or layers differ.
    """
    found = {site.layer: _order_of_layer(file, model, site) for site in sites}
    orders = sorted(set(found.values()))
    if len(orders) > 1:
        raise EngineError(f"{file.path.name!r} orders its keys in another way in some layers than in others: {found}")
    return orders[0]


def _order_of_layer(file: GgufFile, model: nn.Module, site: Site) -> str:
    name = f"blk.{site.layer}.attn_k.weight"
    ours, theirs = _key_weight(model, site), file.weight(name)
    if ours.shape != theirs.shape:
        raise EngineError(
            f"{name!r} of {file.path.name!r} is {tuple(theirs.shape)}, and the model's own key projection "
            f"{tuple(ours.shape)}: the GGUF is of another model"
        )
    heads = ours.unflatten(0, (site.kv_heads, site.key_dim)).transpose(1, 2)
    wanted = theirs.unflatten(0, (site.kv_heads, site.key_dim)).transpose(1, 2)
    errors = {order: float((reorder(heads) - wanted).norm() / heads.norm()) for order, reorder in ORDERS.items()}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < FAR:
        raise EngineError(
            f"{name!r} of {file.path.name!r} is not the model's key projection, in none of the orders "
            f"{', '.join(ORDERS)} (off by {errors[best]:.0%}): the GGUF is of another model, or of a converter that is "
            "not known here"
        )
    return best


def _key_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """The model's own key projection, ``(kv_heads × key_dim, hidden)``."""
    weight = getattr(getattr(model.get_submodule(site.path), "k_proj", None), "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise EngineError(
            f"{site.path!r} has no key projection k_proj of plain numbers to compare the GGUF with; load the base "
            "unquantised, and if keys are projected together with queries, llama.cpp is not served"
        )
    return weight.detach().cpu().float()
