"""Which transformers is installed, for tests that hold from some version on."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

VERSION = Version(transformers.__version__)


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test, or a class of them, before ``version`` of transformers."""
    return pytest.mark.skipif(Version(version) > VERSION, reason=f"before transformers {version} {reason}")


def within(first: str, end: str) -> bool:
    """Whether the installed transformers is ``first`` or later, and before ``end``."""
    return Version(first) <= VERSION < Version(end)
