"""The errors prefixkit raises. All derive from :class:`PrefixkitError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

GUIDE = "docs/extend/adapter.md"
"""Where writing an adapter is taught."""


class PrefixkitError(Exception):
    """Base class: catch it to catch everything prefixkit raises on purpose."""


class PluginError(PrefixkitError):
    """A plugin, or what it handed over, is not what the hooks ask for."""


class UnknownAdapterError(PrefixkitError):
    """No installed plugin serves the model's type."""


class AdapterConflictError(PrefixkitError):
    """Two distributions bring an adapter for the same model type."""


class UnsupportedModelError(PrefixkitError):
    """The object is no model that can take a prefix, or not in its present state."""


class MethodError(PrefixkitError):
    """A method is unknown, or an option does not fit it."""


class ConfigError(PrefixkitError):
    """An argument of :func:`prefixkit.apply` has a value that cannot be served."""


class AttachmentError(PrefixkitError):
    """The model already has a prefix, or has none where one is needed."""


class EngineError(PrefixkitError):
    """The engine cannot do right what the call asks for, and does not guess."""


class CheckpointError(PrefixkitError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class HeadError(CheckpointError):
    """A checkpoint has a head that the model lacks, or has otherwise; the command line adds what to pass."""


class DataError(PrefixkitError):
    """A file of examples is missing or damaged, or lacks a field."""


def closest(name: object, possible: Iterable[str]) -> str:
    """A hint for a message about a misspelt ``name``: `` (did you mean 'x'?)``, or nothing."""
    if not isinstance(name, str):
        return ""
    matches = difflib.get_close_matches(name, list(possible), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few ``names`` for a message, and how many more there are: ``'x', 'y', 'z' and 4 more``."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


class VerificationError(PrefixkitError):
    """A program that should serve a prefix does not say what the model with the prefix says."""
