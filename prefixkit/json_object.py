"""Reading a JSON object, which may be anybody's."""

from __future__ import annotations

import json
from typing import Any

from prefixkit.errors import PrefixkitError

SHOWN = 60
"""How many characters of something else a message shows."""


def json_object(text: str, where: str, error: type[PrefixkitError]) -> dict[str, Any]:
    """The object that ``text`` is.

    Raises:
        PrefixkitError: An ``error``, if it is something else; ``where`` says in the message what is.
    """
    try:
        document = json.loads(text)
    # Of numbers too long and lists too deep Python says so in other ways.
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} is not valid JSON: {reason}") from reason
    if not isinstance(document, dict):
        raise error(f"{where} is not a JSON object: {text.strip()[:SHOWN]!r}")
    return document
