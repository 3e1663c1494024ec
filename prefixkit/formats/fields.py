"""Fields of another library's JSON, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixkit.formats.found import Target


def whole(target: Target, document: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    """A whole number of at least ``least``, or ``None`` where it is not stated.

    Raises:
        CheckpointError: If it is something else.
    """
    value = document.get(name)
    if value is not None and (type(value) is not int or value < least):
        raise target.damaged(f"{name} is {value!r}; it must be a whole number of {least} or more")
    return value


def text(document: Mapping[str, Any], name: str) -> str:
    """A text that is for people to read; empty where there is none."""
    value = document.get(name)
    return value if isinstance(value, str) else ""


def agree(target: Target, document: Mapping[str, Any], name: str, real: int, what: str) -> None:
    """Refuse a number that says something else than what is there.

    Raises:
        CheckpointError: If it does.
    """
    stated = whole(target, document, name)
    if stated not in (None, real):
        raise target.damaged(f"{name} is {stated}, and {what} {real}; the files do not belong together")
