"""Work in a process of its own: what it prints last is its result, in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class ChildError(RuntimeError):
    """A child process failed."""


def ask(arguments: Sequence[str], *, path: str = "") -> Any:
    """What ``python`` with these arguments prints as its last line; ``path`` stands first on its module path."""
    paths = [part for part in (path, os.environ.get("PYTHONPATH", ""), str(ROOT)) if part]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise ChildError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])
