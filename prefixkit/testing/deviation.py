"""Known deviations: tests that cannot pass, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Deviation:
    """Tests that have to fail for a reason that is known; one that passes fails the run.

    Example::

        deviations = (Deviation("torch has no backward of it here", "test_autocast", {"engine": "cache"}),)

    Attributes:
        reason: Why they cannot pass, and whose doing that is.
        test: Name of the test.
        parameters: For which of its parameters, as ``{"engine": "cache"}``; for all by default.
    """

    reason: str
    test: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def covers(self, test: str, parameters: dict[str, Any]) -> bool:
        """Whether the test, run with ``parameters``, is meant."""
        return self.test == test and self.parameters.items() <= parameters.items()
