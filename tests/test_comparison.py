"""The comparison with other libraries: every cell is backed, and the READMEs have the very table."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.speed.cells import ADAPTERHUB, PEFT, PREFIXKIT
from benchmarks.speed.plans import GRIDS

ROOT = Path(__file__).parents[1]
CONTENDERS = {"prefixkit": PREFIXKIT, "peft": PEFT, "adapterhub": ADAPTERHUB}
spec = importlib.util.spec_from_file_location("comparison", ROOT / "docs/comparison.py")
comparison = importlib.util.module_from_spec(spec)
spec.loader.exec_module(comparison)
DATA = comparison.comparison()
CELLS = {f"{row['question']['en']}, {name}": (name, row[name]) for row in DATA["rows"] for name in CONTENDERS}


def is_there(backing, library):
    """Whether a test of that name, or a grid of the benchmarks with that library, exists."""
    if grid := backing.removeprefix("speed:") if backing.startswith("speed:") else "":
        contenders = [name for cell in GRIDS[grid].cells for name in cell.contenders]
        return any(name.startswith(CONTENDERS[library]) for name in contenders)
    path, _, name = backing.partition("::")
    functions = (node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef))
    return name.startswith("test_") and name in {function.name for function in functions}


@pytest.mark.parametrize(("library", "cell"), CELLS.values(), ids=CELLS)
def test_each_cell_is_backed(library, cell):
    assert cell["en"]
    assert cell["zh"]
    assert cell["by"]
    assert [backing for backing in cell["by"] if not is_there(backing, library)] == []


def test_what_does_not_exist_backs_nothing():
    assert not is_there("tests/test_comparison.py::test_that_nobody_wrote", "peft")
    assert not is_there("tests/test_comparison.py::is_there", "peft")
    assert not is_there("speed:memory", "adapterhub")


def test_what_is_said_of_others_is_tried_on_them():
    for name, file in (("peft", "test_beside_peft.py"), ("adapterhub", "test_beside_adapterhub.py")):
        named = {backing for library, cell in CELLS.values() if library == name for backing in cell["by"]}
        assert all(backing.startswith((f"tests/{file}::", "speed:")) for backing in named)


@pytest.mark.parametrize("language", comparison.PAGES)
def test_a_readme_has_the_table_as_it_is(language):
    page = comparison.PAGES[language].read_text(encoding="utf-8")
    assert comparison.table(language) in page
    assert comparison.written(page, language) == page, "python docs/comparison.py"


def test_versions_are_those_that_are_tried():
    pins = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert DATA["versions"]["PEFT"] == pins["peft"]
    session = (ROOT / "noxfile.py").read_text()
    for name, version in (("adapters", "adapters"), ("transformers", "transformers of adapters")):
        assert f'"{name}=={DATA["versions"][version]}"' in session
