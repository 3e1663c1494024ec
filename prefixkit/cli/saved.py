"""The saved prefix that a command names, and the base that it names in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefixkit import checkpoint_files, hub
from prefixkit.checkpoint_files import ADAPTER_FILE
from prefixkit.cli.wrong import CommandError
from prefixkit.errors import CheckpointError, HeadError
from prefixkit.formats import detection

PEFT_TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "body",
}


def saved_prefix(place: str, revision: str | None) -> Path:
    """The folder or the file of a saved prefix, which may be a copy from the hub.

    Raises:
        CommandError: If nothing is there, or a revision of what is here was asked for.
        CheckpointError: If what is there is no prefix, or the hub does not give it.
    """
    check_revision(place, revision)
    path = hub.local_copy(place, revision=revision)
    if not path.exists():
        raise CommandError(f"there is nothing at {place!r}, and that is no name on the hub (user/name)")
    if not is_own(path) and detection.telling_file(path) is None:
        raise checkpoint_files.no_checkpoint(path)
    return path


def check_revision(place: str, revision: str | None) -> None:
    """Refuse a revision of what is here, where it would mean nothing.

    Raises:
        CommandError: If there is one.
    """
    if revision is not None and Path(place).exists():
        raise CommandError(f"--revision is of a repository on the hub, and {place!r} is here; leave it out")


def is_own(folder: Path) -> bool:
    """Whether prefixkit wrote it."""
    return (folder / checkpoint_files.TENSOR_FILE).is_file()


def base_of(folder: Path, asked: str | None) -> str:
    """The base that was asked for, or else the one that the prefix names.

    Raises:
        CommandError: If neither is there.
    """
    if asked is not None:
        return asked
    document = _adapter(folder)
    named = document.get("base_model_name_or_path") or document.get("model_name")
    if is_own(folder):
        named = checkpoint_files.read_config(folder).base_model_name_or_path
    if not named:
        raise CommandError(f"the prefix in {str(folder)!r} does not say what its base is; pass --base")
    return str(named)


def task_of(folder: Path, asked: str | None) -> str | None:
    """The task that was asked for, or else the one that PEFT has noted."""
    return asked or PEFT_TASKS.get(str(_adapter(folder).get("task_type")))


@contextmanager
def head_hint(what_to_do: str) -> Iterator[None]:
    """Add to an error about the prefix's head what to do on the command line."""
    try:
        yield
    except HeadError as error:
        raise CommandError(f"{error}; {what_to_do}") from error


def _adapter(folder: Path) -> dict[str, Any]:
    try:
        return checkpoint_files.read_json(folder / ADAPTER_FILE)
    except (OSError, CheckpointError):
        return {}  # what is damaged gets its error when it is loaded
