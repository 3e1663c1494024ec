"""Run files of wrong subjects, each class with the tests that it names, and print how they ended as JSON.

``python tests/wrong/run.py adapters.py``, with ``tests`` on the path. A test that found its mistake
once is not run again with other parameters. What found a mistake is then run with the right subject.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


class Outcomes:
    """A pytest plugin: chooses the tests and keeps how they ended.

    Attributes:
        classes: By file and class: the ``subject`` that was made wrong, the tests that must fail (none
            for a right subject), and how each test ended: ``"passed"``, ``"caught"`` or ``"crash"``,
            and the error.
    """

    def __init__(self) -> None:
        self.classes: dict[str, dict[str, Any]] = {}
        self.named: set[str] = set()
        self.caught: set[tuple[str, str]] = set()

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> list[Any] | None:
        """Leave out tests that nobody names before their parameters are made: they are many."""
        if isinstance(collector, pytest.Module):
            self.named.update(getattr(obj, "caught_by", ()))
        if not isinstance(collector, pytest.Class) or not name.startswith("test_"):
            return None
        names = {asked.partition("[")[0] for asked in self._asked(collector.obj)}
        return None if name in names else []

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Keep the parameters asked for, and put the right subjects last."""
        items[:] = [item for item in items if not names_of(item).isdisjoint(self._asked(item.cls))]
        items.sort(key=lambda item: not item.cls.caught_by)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what proves something more; they share no fixtures, so that each tears down all."""
        for item in session.items:
            if self._proves_more(item):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return True

    def _proves_more(self, item: pytest.Function) -> bool:
        if not item.cls.caught_by:
            return (subject_of(item), item.name) in self.caught
        return any(not self._is_caught(item, name) for name in names_of(item) & set(item.cls.caught_by))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> Any:
        """Keep what was raised, and whether it counts."""
        report = yield
        kept = self._kept(item)["tests"]
        if call.excinfo is None:
            kept.setdefault(item.name, ["passed", ""])
            return report
        counts = call.when == "call" and call.excinfo.errisinstance(item.cls.fails_with)
        kept[item.name] = ["caught" if counts else "crash", f"{call.when}: {call.excinfo.exconly()}"[:500]]
        if counts:
            self.caught.add((subject_of(item), item.name))
        return report

    def _asked(self, cls: Any) -> set[str]:
        return set(cls.caught_by) or self.named

    def _kept(self, item: pytest.Function) -> dict[str, Any]:
        empty = {"subject": subject_of(item), "caught_by": sorted(item.cls.caught_by), "tests": {}}
        return self.classes.setdefault(f"{item.path.stem}.{item.cls.__name__}", empty)

    def _is_caught(self, item: pytest.Function, name: str) -> bool:
        runs = self._kept(item)["tests"].items()
        return any(what == "caught" and name in {test, test.partition("[")[0]} for test, (what, _) in runs)


def names_of(item: pytest.Function) -> set[str]:
    """Its name with parameters, and without."""
    return {item.name, item.originalname}


def subject_of(item: pytest.Function) -> str:
    """The right subject that the item's class is or was made from."""
    return next(cls.__name__ for cls in item.cls.__mro__ if "make_model" in vars(cls))


def main(files: list[str]) -> None:
    """Run, and print the outcomes in the last line."""
    outcomes = Outcomes()
    paths = [str(HERE / file) for file in (*files, "controls.py")]
    pytest.main([*paths, "-q", "--tb=no", "-p", "no:cacheprovider", "-r", "N", "-m", ""], plugins=[outcomes])
    sys.stdout.write("\n" + json.dumps(outcomes.classes) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
