"""The prefix in a running llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefixkit.errors import CheckpointError, ConfigError, EngineError
from prefixkit.serving.llama_cpp.state_file import TYPES, Layout
from prefixkit.serving.verdict import Answer, greedy

if TYPE_CHECKING:
    from llama_cpp import Llama

DESCRIPTION = "llama_cpp.json"
"""The file that says what the others are."""
FORMAT = 1


def library() -> Any:
    """The module ``llama_cpp``.

    Raises:
        ImportError: If llama-cpp-python is missing.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError(
            "llama.cpp is run by llama-cpp-python, which is missing: pip install 'prefixkit[llama-cpp]'"
        ) from error
    return llama_cpp


def described(folder: Path) -> dict[str, Any]:
    """What the folder's description says.

    Raises:
        CheckpointError: If there is none, or of another format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} has no {DESCRIPTION}; write a prefix for llama.cpp there first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{str(path)!r} has format {found.get('format')!r}; this version reads {FORMAT}")
    return found


def restore(llama: Llama, folder: str | Path) -> list[int]:
    """Put a prefix into llama.cpp, and say with which ids every prompt has to begin from now on.

    The file that fits ``llama`` is chosen by its ``type_k`` and ``flash_attn``. The prefix stays as long as every
    prompt begins with the ids: what a prompt has in common with the one before it is not computed again. A prompt that
    begins otherwise, ``llama.reset()`` and ``llama.load_state()`` lose the prefix without a word; restore it again.

    Example::

        llama = Llama("base.gguf", n_ctx=2048)
        placeholders = restore(llama, "runs/llama-cpp")
        llama.create_completion(placeholders + llama.tokenize(b"name : Aromi", add_bos=False))

    Args:
        llama: A ``llama_cpp.Llama`` of the GGUF that the prefix was written for, or of another quantisation of it.
        folder: What :func:`write` wrote.

    Returns:
        The placeholder ids, one for each virtual token.

    Raises:
        CheckpointError: If the folder has no file for this layout, or a damaged one.
        EngineError: If llama.cpp refuses the file.
    """
    folder = Path(folder)
    description = described(folder)
    placeholders = list(description["placeholders"])
    path = folder / layout_of(llama).file
    _check_whole(path, description["files"].get(path.name))
    load_sequence(llama, path, placeholders)
    llama.input_ids[: len(placeholders)] = placeholders
    llama.n_tokens = len(placeholders)
    return placeholders


def _check_whole(path: Path, digest: str | None) -> None:
    """Refuse a file that is not what was written: llama.cpp ends the whole process over a file that is too short."""
    if not path.is_file():
        raise CheckpointError(f"{str(path.parent)!r} has no {path.name}, which this llama.cpp needs; write it too")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise CheckpointError(f"{str(path)!r} is not the file that {DESCRIPTION} describes; write the prefix again")


def layout_of(llama: Llama) -> Layout:
    """How ``llama`` lays its cache out.

    Raises:
        ConfigError: If keys or values are quantised, or of different types.
    """
    settings = llama.context_params
    names = {number: name for name, (number, _) in TYPES.items()}
    types = {names.get(settings.type_k), names.get(settings.type_v)}
    if len(types) > 1 or None in types:
        raise ConfigError(
            f"type_k is {settings.type_k} and type_v {settings.type_v}; a prefix is written for caches of one type, "
            f"{' or '.join(f'{name} ({number})' for number, name in names.items())}"
        )
    flash = settings.flash_attn_type == library().LLAMA_FLASH_ATTN_TYPE_ENABLED
    return Layout(str(types.pop()), flash=flash)


def load_sequence(llama: Llama, path: Path, placeholders: Sequence[int], sequence: int = 0) -> None:
    """Have llama.cpp read a state file into one of its sequences.

    Raises:
        EngineError: If it refuses, or has not all of it afterwards.
    """
    program = library()
    room, count = len(placeholders), ctypes.c_size_t(0)
    ids = (program.llama_token * room)()
    with _overheard() as said:
        done = program.llama_state_seq_load_file(
            llama.ctx, str(path).encode(), sequence, ids, room, ctypes.byref(count)
        )
    if not done:
        raise EngineError(
            f"llama.cpp refuses {path.name!r}, which has to fit its cache (type_k, type_v, flash_attn, streams), its "
            f"context (n_ctx, for {room} virtual tokens and the text) and its model: {_one_line(said.getvalue())}"
        )
    last = program.llama_memory_seq_pos_max(program.llama_get_memory(llama.ctx), sequence)
    if list(ids) != list(placeholders) or last != room - 1:
        raise EngineError(
            f"{path.name!r} has the tokens {list(ids)}, the last one at {last}, and the text goes behind {placeholders}"
        )


@contextlib.contextmanager
def _overheard() -> Iterator[io.StringIO]:
    """What llama.cpp says meanwhile; llama-cpp-python prints it, and takes its errors for the least of levels."""
    logger, said = logging.getLogger("llama-cpp-python"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        with contextlib.redirect_stderr(said):
            yield said
    finally:
        logger.setLevel(level)


def _one_line(said: str) -> str:
    return "; ".join(line.strip() for line in said.splitlines() if line.strip()) or "it does not say why"


@contextlib.contextmanager
def started(gguf: Path, layout: Layout, context: int, threads: int | None) -> Iterator[Llama]:
    """Inside, llama.cpp runs ``gguf`` with room for ``context`` tokens."""
    number, _ = TYPES[layout.dtype]
    program = library()
    if not gguf.is_file():
        raise CheckpointError(f"there is no file {str(gguf)!r}; gguf= is the GGUF that llama.cpp runs")
    threaded = {"n_threads": threads, "n_threads_batch": threads}
    types = {"type_k": number, "type_v": number, "flash_attn": layout.flash}
    llama = program.Llama(str(gguf), n_ctx=context, verbose=False, **threaded, **types)
    try:
        yield llama
    finally:
        llama.close()


def ask(llama: Llama, prompt: Sequence[int], new_tokens: int, never: Sequence[int]) -> Answer:
    """What llama.cpp says to ``prompt``: each time the likeliest token but those of ``never``."""
    program, read = library(), list[int]()

    def step(unread: list[int]) -> torch.Tensor:
        # A prompt that goes on where the last one ended, as any user's: what is there already is kept.
        read.extend(unread)
        next(llama.generate(list(read), temp=0.0))
        pointer = program.llama_get_logits_ith(llama.ctx, -1)
        return torch.tensor(pointer[: llama.n_vocab()], dtype=torch.float32)

    return greedy(step, prompt, new_tokens, never)
