"""The saved prefix that a command names, and the base that it names in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixkit import checkpoint_files
from prefixkit.cli.wrong import CommandError

ADAPTER = "adapter_config.json"
PEFT_TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "body",
}


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


def _adapter(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # what is damaged gets its error when it is loaded
    return document if isinstance(document, dict) else {}
