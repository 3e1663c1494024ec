"""Where a command writes: looked at before the work, which would be lost."""

from __future__ import annotations

import os
from pathlib import Path

from prefixkit.checkpoint_files import ADAPTER_FILE
from prefixkit.cli.wrong import CommandError


def check_file(path: Path, name: str, *, overwrite: bool) -> None:
    """Look whether a file can be written to ``path``, which the command line calls ``name``.

    Raises:
        CommandError: If it cannot, or something is there that may not be replaced.
    """
    if path.is_dir():
        raise CommandError(f"{name} is {str(path)!r}, which is a folder; name a file")
    if path.exists() and not path.is_file():
        raise CommandError(f"{name} is {str(path)!r}, which is no plain file; name another place")
    _check(path, name, taken=path.is_file(), overwrite=overwrite)


def check_folder(path: Path, name: str, *, overwrite: bool) -> None:
    """Look whether a folder can be written to ``path``, which the command line calls ``name``.

    Raises:
        CommandError: If it cannot, or something is there that may not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise CommandError(f"{name} is {str(path)!r}, which is a file; name a folder")
    _check(path, name, taken=path.is_dir() and any(path.iterdir()), overwrite=overwrite)


def check_own_folder(path: Path, name: str, *, overwrite: bool) -> None:
    """As :func:`check_folder`, for a checkpoint of prefixkit.

    Raises:
        CommandError: As there, and where it would stand beside another library's, which nobody could load any more.
    """
    check_folder(path, name, overwrite=overwrite)
    if (path / ADAPTER_FILE).is_file():
        raise CommandError(
            f"{name} is {str(path)!r}, which holds an adapter of another library ({ADAPTER_FILE}); name another folder"
        )


def refuse_source(path: Path, source: Path, what: str) -> None:
    """Refuse to write over ``source``, or a file in it, however the two are spelt.

    Raises:
        CommandError: If that is asked for; ``what`` says in the message what ``source`` is.
    """
    if _same(path, source) or (path.is_file() and _same(path.parent, source)):
        raise CommandError(f"{str(path)!r} is where {what} comes from; name another place")


def is_stream(path: Path) -> bool:
    """Whether it is a pipe or a device, which is written to and not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _check(path: Path, name: str, *, taken: bool, overwrite: bool) -> None:
    if path.is_symlink() and not path.exists():
        raise CommandError(f"{name} is {str(path)!r}, a link that leads nowhere; name another place")
    if taken and not overwrite:
        raise CommandError(f"{str(path)!r} is there already; name another place, or pass --overwrite")
    start = path if path.is_dir() else path.absolute().parent
    folder = next(place for place in (start, *start.absolute().parents) if os.path.lexists(place))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written to" if folder.is_dir() else "is no folder"
        raise CommandError(f"{name} is {str(path)!r}, and {str(folder)!r} {why}; name another place")
