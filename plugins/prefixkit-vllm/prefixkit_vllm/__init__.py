"""A prefix in an unmodified vLLM: P placeholder ids in front of a prompt, whose keys and values a connector brings.

A prefix is written into a folder without vLLM. The server is given :mod:`prefixkit_vllm.connector` and the folders;
a request that begins with a folder's placeholders is answered with its prefix, and any other by the bare base.

The names below load on first use: what runs inside vLLM needs little of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixkit_vllm.checking import answers as answers, runs as runs, verify as verify
    from prefixkit_vllm.naming import (
        chat_template as chat_template,
        prompt as prompt,
        transfer_config as transfer_config,
    )
    from prefixkit_vllm.writing import write as write

name = "vllm"
"""Of the target."""

_HOME = {
    "answers": "checking",
    "chat_template": "naming",
    "prompt": "naming",
    "runs": "checking",
    "transfer_config": "naming",
    "verify": "checking",
    "write": "writing",
}

__all__ = [*_HOME, "name"]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prefixkit_vllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prefixkit_vllm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
