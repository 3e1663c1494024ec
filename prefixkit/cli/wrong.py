"""What the user got wrong on the command line."""

from __future__ import annotations

from prefixkit.errors import PrefixkitError


class CommandError(PrefixkitError):
    """An argument of the command cannot be used as it is."""
