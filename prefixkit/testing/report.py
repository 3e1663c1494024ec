"""A pytest plugin for conformance tests: their markers, and a table of what was right.

Load it in the ``conftest.py`` at the top of a project, or for one run::

    pytest_plugins = ["prefixkit.testing.report"]

    $ pytest -p prefixkit.testing.report -m "not gpu" --conformance-table conformance.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from prefixkit.testing.conformance import REFUSED, Conformance
from prefixkit.testing.table import DEVIATES, RAISES, RIGHT, SKIPPED, Result, modes, page

MARKERS = {
    "conformance": "a test of the conformance kit",
    "slow": "compiles whole steps",
    "gpu": "needs a GPU",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer ``--conformance-table``."""
    parser.getgroup("prefixkit").addoption(
        "--conformance-table",
        metavar="FILE",
        help="write a Markdown page of what the conformance tests found, if all of them ran and none failed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers of the kit, and make the table if it is asked for."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    path = config.getoption("--conformance-table")
    if path and not hasattr(config, "workerinput"):  # one process of pytest-xdist gets the reports of the others
        config.pluginmanager.register(TableWriter(Path(path)), "prefixkit-conformance-table")


class TableWriter:
    """Follows a run and writes the page at its end.

    Args:
        path: The page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.items: list[pytest.Function] = []
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.message: str = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note all conformance tests, before any is deselected."""
        functions = (item for item in items if isinstance(item, pytest.Function))
        self.items = [item for item in functions if item.cls is not None and issubclass(item.cls, Conformance)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what a test reports."""
        self.reports.setdefault(report.nodeid, []).append(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the page; without a failure before, a page that cannot be written is one."""
        if exitstatus != pytest.ExitCode.OK:
            self.message = f"{self.path} is not written: the run failed"
            return
        if not self.items:  # the others have collected them
            session.perform_collect()
        problem = self._problem()
        if problem:
            self.message = f"{self.path} is not written: {problem}"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        models = {_model(item.cls): item.cls for item in self._of_models_that_ran()}
        results = [self._result(item) for item in self._of_models_that_ran() if item.nodeid in self.reports]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(page(models, results), encoding="utf-8")
        self.message = f"{self.path} is written"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say whether the page was written."""
        terminalreporter.write_sep("-", f"conformance table: {self.message}")

    def _of_models_that_ran(self) -> list[pytest.Function]:
        ran = {item.cls for item in self.items if item.nodeid in self.reports}
        return [item for item in self.items if item.cls in ran and item.originalname in modes()]

    def _problem(self) -> str:
        """Why the page would be no true account; empty if it is one."""
        items = self._of_models_that_ran()
        if not items:
            return "no conformance test ran in this process"
        names: dict[str, type] = {}
        for item in items:
            if names.setdefault(_model(item.cls), item.cls) is not item.cls:
                return f"two classes are named {item.cls.__name__}"
        left_out = [item for item in items if item.nodeid not in self.reports and not item.get_closest_marker("gpu")]
        return f"{len(left_out)} tests did not run, such as {left_out[0].nodeid}" if left_out else ""

    def _result(self, item: pytest.Function) -> Result:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        settings = {name: str(value) for name, value in parameters.items()}
        on_cache = settings.pop("engine", None) == "cache"
        outcome, reason = _outcome(self.reports[item.nodeid])
        model, test = _model(item.cls), item.originalname
        return Result(model=model, test=test, on_cache=on_cache, settings=settings, outcome=outcome, reason=reason)


def _outcome(reports: Sequence[pytest.TestReport]) -> tuple[str, str]:
    """What one test found, and the reason."""
    for report in reports:
        if report.skipped and hasattr(report, "wasxfail"):
            return DEVIATES, str(report.wasxfail)
        if report.skipped:
            return SKIPPED, str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    properties = (pair for report in reports for pair in report.user_properties)
    refusals = {str(reason): None for name, reason in properties if name == REFUSED}
    return (RAISES, " / ".join(refusals)) if refusals else (RIGHT, "")


def _model(cls: type) -> str:
    return cls.__name__.removeprefix("Test")
