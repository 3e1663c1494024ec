"""llama.cpp's file of the state of one sequence: token ids, and the keys and values of each.

What is written here is what ``llama_state_seq_save_file`` of version 3 writes. llama.cpp refuses a file of another
version, layout or type; it does not refuse wrong numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from prefixkit.errors import EngineError

if TYPE_CHECKING:
    from prefixkit.layout import KeyValue

MAGIC: Final = 0x67677371
VERSION: Final = 3
TYPES: Final = {"f32": (0, torch.float32), "f16": (1, torch.float16)}
"""ggml's number of a type, and torch's name, by the name that llama.cpp's options have for it."""


@dataclass(frozen=True)
class Body:
    """What one of a model's caches holds; a model with sliding windows in some layers has two caches.

    Attributes:
        layers: Keys and values ``(kv_heads, tokens, dim)``, keys in the order of the GGUF's rows.
        first: The position of the first token.
    """

    layers: Sequence[KeyValue]
    first: int = 0


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays a cache out, by the options that it is started with.

    Attributes:
        dtype: ``"f16"`` or ``"f32"``: of keys and values (``type_k``, ``type_v``).
        flash: Whether flash attention is on; without it values are transposed.
        streams: How many sequences have a cache of their own; 1 where they share one (``kv_unified``).
    """

    dtype: str = "f16"
    flash: bool = False
    streams: int = 1

    @property
    def file(self) -> str:
        """The name of the file for it."""
        return f"prefix.{self.dtype}{'.flash' if self.flash else ''}.bin"


def state(tokens: Sequence[int], bodies: Sequence[Body], layout: Layout) -> bytes:
    """The content of a state file.

    Args:
        tokens: Their ids, which a prompt has to begin with.
        bodies: Of each of the model's caches.
        layout: How the caches are laid out.

    Raises:
        EngineError: If a number does not fit the type.
    """
    header = struct.pack("<3I", MAGIC, VERSION, len(tokens)) + _numbers("i", tokens)
    return b"".join([header, *(part for body in bodies for part in _body(body, layout))])


def _body(body: Body, layout: Layout) -> Iterator[bytes]:
    yield struct.pack("<I", layout.streams)
    cells = body.layers[0].key.shape[1]
    yield struct.pack("<I", cells)
    for position in range(body.first, body.first + cells):
        yield struct.pack("<iIi", position, 1, 0)  # of one sequence, whose number the reader replaces
    yield struct.pack("<II", not layout.flash, len(body.layers))
    number, dtype = TYPES[layout.dtype]
    for key, _ in body.layers:
        yield struct.pack("<iQ", number, _row_bytes(key, dtype))
        yield _rows(key, dtype)
    for _, value in body.layers:
        if layout.flash:
            yield struct.pack("<iQ", number, _row_bytes(value, dtype))
            yield _rows(value, dtype)
        else:
            yield struct.pack("<iII", number, dtype.itemsize, value.shape[0] * value.shape[2])
            yield _bytes(value.transpose(1, 2), dtype)
    yield struct.pack("<I", 0) * (layout.streams - 1)  # nothing for the others


def _row_bytes(part: torch.Tensor, dtype: torch.dtype) -> int:
    return part.shape[0] * part.shape[2] * dtype.itemsize


def _rows(part: torch.Tensor, dtype: torch.dtype) -> bytes:
    """A row for each token, the heads one after the other."""
    return _bytes(part.transpose(0, 1), dtype)


def _bytes(part: torch.Tensor, dtype: torch.dtype) -> bytes:
    cast = part.detach().cpu().to(dtype)
    if not bool(cast.isfinite().all()):
        largest = float(part.abs().max())
        raise EngineError(f"a number as large as {largest:.3g} is not finite in {dtype}; write dtypes=('f32',) only")
    content: bytes = cast.contiguous().numpy().astype(f"<f{dtype.itemsize}", copy=False).tobytes()
    return content


def _numbers(kind: str, numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}{kind}", *numbers)
