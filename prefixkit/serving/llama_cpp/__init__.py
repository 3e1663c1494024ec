"""A prefix for llama.cpp and llama-server: state files that a slot restores, and a check that they are not lost.

A stock llama.cpp keeps the keys and values of what a sequence has read, and reads them back from a file. So a prefix is
written as the state of a text of P placeholder tokens: their ids are never looked at again, and the keys and values
beside them are the prefix's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.checkpoint_files import replace_file
from prefixkit.errors import CheckpointError, ConfigError, EngineError, closest
from prefixkit.layout import KeyValue
from prefixkit.prefixes import require
from prefixkit.serving.llama_cpp import server as running_server
from prefixkit.serving.llama_cpp.gguf_file import ORDERS, GgufFile, order_of
from prefixkit.serving.llama_cpp.running import DESCRIPTION, FORMAT, ask, described, restore, started
from prefixkit.serving.llama_cpp.state_file import TYPES, Body, Layout, state
from prefixkit.serving.placeholders import check_decoder_only, check_number, drawn
from prefixkit.serving.verdict import Answer, Verdict, answers_of, ends_of, judge
from prefixkit.turning import turned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.adapter import Site
    from prefixkit.attachment import Attachment

__all__ = ["answers", "name", "restore", "runs", "verify", "write"]

name = "llama.cpp"
"""Of the target."""


def write(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    gguf: str | Path,
    dtypes: Sequence[str] = tuple(TYPES),
    streams: int = 1,
    placeholders: Sequence[int] | None = None,
) -> None:
    """Write the state files of a model's prefix, for every layout that llama.cpp may have.

    ``prefix.<type>.bin`` is for a llama.cpp without flash attention, ``prefix.<type>.flash.bin`` for one with it;
    ``llama_cpp.json`` has the placeholder ids. Every GGUF of the same model takes the same files, whatever its
    quantisation, as long as one converter made it.

    Example::

        llama_cpp.write(model, "runs/llama-cpp", gguf="base.gguf")

    Args:
        model: A decoder-only model with a prefix.
        folder: Where the files go; it is made if there is none.
        gguf: The GGUF that llama.cpp will run. Its key projections are compared with the model's, which tells the order
            of a key's numbers.
        dtypes: Of llama.cpp's cache: ``"f16"`` (its default) and ``"f32"``.
        streams: Of llama-server: 1 where its slots share a cache (its default; ``--kv-unified``), else how many there
            are (``--parallel``).
        placeholders: The ids, P of them; by default words of the vocabulary drawn by the prefix's own numbers, so that
            two prefixes on one server are not taken for each other.

    Raises:
        AttachmentError: If the model has no prefix.
        CheckpointError: If there is no GGUF, or ``folder`` is a file.
        ConfigError: If ``dtypes``, ``streams`` or ``placeholders`` cannot be.
        EngineError: If llama.cpp cannot hold the prefix, or the GGUF is not of this model.
        ImportError: If the package ``gguf`` is missing.
    """
    folder, attachment = Path(folder), require(model).attachment
    _check_options(folder, attachment, dtypes, streams, placeholders)
    check_decoder_only(attachment, name)
    flat = turned(model, "shift")  # to where it stands in front of a text that starts at P
    file, sites = GgufFile(Path(gguf)), attachment.layout.sites
    _check_layers(file, sites)
    order = order_of(file, model, sites)
    pieces = {
        place: KeyValue(ORDERS[order](key).float(), value.float())
        for place, (key, value) in attachment.pieces(flat).items()
    }
    bodies = _bodies(sites, pieces)
    ids = list(placeholders) if placeholders is not None else drawn(file.words(), pieces.values())
    layouts = [Layout(dtype, flash, streams) for dtype in dtypes for flash in (False, True)]
    contents = {layout.file: state(ids, bodies, layout) for layout in layouts}
    description = {
        "format": FORMAT,
        "model_type": attachment.config.model_type,
        "num_virtual_tokens": len(ids),
        "placeholders": ids,
        "text_starts_at": len(ids),
        "eos_token_ids": list(ends_of(model)),
        "order_of_keys": order,
        "streams": streams,
        "files": {file_name: hashlib.sha256(content).hexdigest() for file_name, content in contents.items()},
    }
    if attachment.writes(model):
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, content in contents.items():
            replace_file(folder / file_name, content)
        replace_file(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def answers(
    folder: str | Path,
    prompt: Sequence[int],
    new_tokens: int = 16,
    *,
    gguf: str | Path,
    dtype: str = "f16",
    flash: bool = False,
    threads: int | None = None,
) -> tuple[Answer, Answer]:
    """What llama.cpp says to ``prompt`` with the prefix, and without it; llama-cpp-python runs it.

    Args:
        folder: What :func:`write` wrote.
        prompt: Token ids of the model, without placeholders.
        new_tokens: How many to generate.
        gguf: The GGUF to run.
        dtype: Of the cache.
        flash: Whether flash attention is on.
        threads: How many; llama-cpp-python's default if left out.

    Raises:
        CheckpointError: If the folder or the GGUF is not there.
        ConfigError: If the prompt is empty.
        EngineError: If llama.cpp refuses the file.
        ImportError: If llama-cpp-python is missing.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; llama.cpp would read the last placeholder again, as text")
    _check_dtypes([dtype])
    description = described(Path(folder))
    never, tokens = description["eos_token_ids"], description["num_virtual_tokens"]
    room = tokens + len(prompt) + new_tokens
    with started(Path(gguf), Layout(dtype, flash), room, threads) as llama:
        without = ask(llama, prompt, new_tokens, never)
        placeholders = restore(llama, folder)
        return ask(llama, [*placeholders, *prompt], new_tokens, never), without


def verify(
    model: PreTrainedModel,
    folder: str | Path,
    prompt: Sequence[int],
    new_tokens: int = 16,
    *,
    gguf: str | Path | None = None,
    dtype: str = "f16",
    flash: bool = False,
    threads: int | None = None,
    server: str | None = None,
) -> Verdict:
    """Whether llama.cpp says with the prefix what the model with the prefix says.

    Args:
        model: With the same prefix on it.
        folder: What :func:`write` wrote.
        prompt: Token ids of the model, without placeholders.
        new_tokens: How many to generate.
        gguf: The GGUF to run in this process.
        dtype: Of its cache.
        flash: Whether it has flash attention on.
        threads: How many; llama-cpp-python's default if left out.
        server: The address of a running llama-server, such as ``"http://127.0.0.1:8080"``, which is asked in place of
            a llama.cpp in this process. Its own settings say which file it takes. The prefix goes into slot 0.

    Raises:
        ConfigError: If neither ``gguf`` nor ``server`` is given, or both.
        VerificationError: If it does not.
    """
    if (gguf is None) == (server is None):
        raise ConfigError("pass either gguf=, for a llama.cpp in this process, or server=, for one that is running")
    ours = answers_of(model, prompt, new_tokens)
    if server is not None:
        ours = _with_probabilities(ours)
        size = len(ours[0].logits)
        theirs = running_server.answers(Path(folder), prompt, new_tokens, server=server, vocabulary=size)
        program = "llama-server"
    else:
        assert gguf is not None
        theirs = answers(folder, prompt, new_tokens, gguf=gguf, dtype=dtype, flash=flash, threads=threads)
        program = f"{name} ({Layout(dtype, flash).file})"
    common = min(len(answer.logits) for answer in (*ours, *theirs))  # converters leave out ids that no token has
    with_prefix, without = ((_first(answer, common) for answer in pair) for pair in zip(ours, theirs, strict=True))
    ours_there, theirs_there = zip(with_prefix, without, strict=True)
    return judge(program, ours_there, theirs_there)


def runs(folder: str | Path, *, server: str | None = None, **_: Any) -> list[dict[str, Any]]:
    """The options of :func:`verify` for each layout that was written; a server has one, and so has llama-cpp-python.

    Raises:
        EngineError: If llama-cpp-python cannot run what was written.
    """
    description = described(Path(folder))
    if server is not None:
        return [{}]
    if description["streams"] > 1:
        raise EngineError(
            f"this is written for {description['streams']} streams, and llama-cpp-python has one; ask a llama-server "
            "(server=), or write another folder with streams=1 to check the prefix"
        )
    layouts = [Layout(dtype, flash) for dtype in TYPES for flash in (False, True)]
    return [{"dtype": one.dtype, "flash": one.flash} for one in layouts if one.file in description["files"]]


def _with_probabilities(answers: tuple[Answer, Answer]) -> tuple[Answer, Answer]:
    """Log-probabilities in place of logits: what a server tells."""
    first, second = (replace(answer, logits=answer.logits.log_softmax(-1)) for answer in answers)
    return first, second


def _first(answer: Answer, count: int) -> Answer:
    return replace(answer, logits=answer.logits[:count])


def _check_options(
    folder: Path, attachment: Attachment, dtypes: Sequence[str], streams: int, placeholders: Sequence[int] | None
) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot write to {str(folder)!r}: it is a file; name a folder")
    _check_dtypes(dtypes)
    if streams < 1:
        raise ConfigError(f"streams is {streams}; it must be 1 or more")
    if placeholders is not None:
        check_number(placeholders, attachment.config.num_virtual_tokens)


def _check_dtypes(dtypes: Sequence[str]) -> None:
    if not dtypes:
        raise ConfigError(f"dtypes is empty; possible: {', '.join(TYPES)}")
    for dtype in dtypes:
        if dtype not in TYPES:
            raise ConfigError(f"the type of a cache is {dtype!r}{closest(dtype, TYPES)}; possible: {', '.join(TYPES)}")


def _check_layers(file: GgufFile, sites: Sequence[Site]) -> None:
    """Refuse a GGUF of another depth, or with other windows."""
    layers = file.number("block_count")
    if layers != len(sites):
        raise EngineError(f"{file.path.name!r} has {layers} layers, and the prefix {len(sites)}")
    window = file.number("attention.sliding_window")
    others = sorted({site.window or 0 for site in sites} - {0, window})
    if others or (window and not any(site.window for site in sites)):
        raise EngineError(
            f"sliding windows are of {window or 'no'} tokens in {file.path.name!r}, and of {others or 'no'} in the "
            "model; llama.cpp would read a long text otherwise"
        )
    if all(site.window for site in sites):
        raise EngineError("every layer has a sliding window; where llama.cpp keeps keys then is not known")


def _bodies(sites: Sequence[Site], pieces: dict[str, KeyValue]) -> list[Body]:
    """Of the layers without a window, and of those with one, which keep what the next token may see."""
    whole = [pieces[site.place] for site in sites if not site.window]
    windowed = [pieces[site.place] for site in sites if site.window]
    bodies = [Body(whole)]
    if windowed:
        window = max(site.window or 0 for site in sites)
        first = max(0, windowed[0].key.shape[1] - window)
        bodies.append(Body([KeyValue(key[:, first:], value[:, first:]) for key, value in windowed], first))
    return bodies
