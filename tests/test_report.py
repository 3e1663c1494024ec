"""The table of a conformance run says what the run found, or is not written; the one in the docs is whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from prefixkit.testing import report, table

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
KIT = '''
import pytest
from prefixkit.testing import report, table
from prefixkit.testing.conformance import REFUSED


class Numbers:
    """Numbers and their likes."""

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("engine", ["attention", "cache"])
    def test_padding(self, request, engine, side):
        """Padded rows | equal *rows* alone.

        And more.
        """
        if engine == "cache":
            self.on_cache(request, side)

    def test_windows(self):
        """Windows slide."""
        pytest.importorskip("no_such_module")

    @pytest.mark.gpu
    def test_many_devices(self):
        """Runs on many devices."""


class Life:
    """From apply to remove."""

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("method", ["one", "two"])
    def test_training(self, method, dtype):
        """A training step."""
        assert (method, dtype) != self.wrong


class Kit(Numbers, Life):
    pytestmark = pytest.mark.conformance
    device = "cpu"
    deviations = {}
    wrong = None

    def on_cache(self, request, side):
        pass

    @pytest.fixture(autouse=True)
    def known_deviation(self, request):
        if request.node.name in self.deviations:
            reason = self.deviations[request.node.name]
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


report.Conformance = table.Conformance = Kit
'''
MODELS = """
import pytest
from kit import REFUSED, Kit


class TestPlain(Kit):
    test_windows = None


class TestOdd(Kit):
    wrong = ("two", "float16")
    deviations = {"test_training[two-float16]": "a `known` bug"}

    def test_of_its_own(self):
        pass

    def on_cache(self, request, side):
        if side == "left":
            request.node.user_properties.append((REFUSED, "no <left> padding"))


@pytest.mark.gpu
class TestOnGPU(Kit):
    device = "cuda"
"""
PAGE = """\
## Numbers

Numbers and their likes.

| mode | Plain | Odd |
| --- | :-: | :-: |
| Padded rows \\| equal \\*rows\\* alone | ✓ | ✓ |
| Windows slide | – | not run[^1] |

## Life

From apply to remove.

| mode | Plain | Odd |
| --- | :-: | :-: |
| A training step | ✓ | [^2] |

## Cache engine

The tests that run with both engines; here with the cache engine.

| mode | Plain | Odd |
| --- | :-: | :-: |
| Padded rows \\| equal \\*rows\\* alone | ✓ | partly |

### What the cache engine says when it raises

“no \\<left\\> padding”

- Padded rows \\| equal \\*rows\\* alone: Odd with side left

## Not part of this run

These tests of the kit concern none of the models here, or another device.

- Runs on many devices

[^1]: Skipped: could not import 'no_such_module': No module named 'no_such_module'
[^2]: a `known` bug (only with method two, dtype float16)
"""


CONFTEST = "import kit"
"""In a process of its own, what is patched here has to be patched there."""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs the two models of a small kit, from two files."""
    for module in (report, table):
        monkeypatch.setattr(module, "Conformance", module.Conformance)
    pytester.makepyfile(kit=KIT)
    first, _, second = MODELS.partition("\n\nclass TestOdd")

    def go(*arguments, change=("", "")):
        head = "import pytest\nfrom kit import REFUSED, Kit\n\n\nclass TestOdd"
        pytester.makepyfile(test_a=first, test_b=(head + second).replace(*change))
        plugins = ("-p", "prefixkit.testing.report", "-p", "no:cacheprovider", "--strict-markers")
        return pytester.runpytest_inprocess(*plugins, "--conformance-table", "page.md", *arguments)

    return go


def test_page_has_what_each_test_found(run, pytester):
    done = run("-m", "not gpu")
    done.assert_outcomes(passed=16, skipped=1, xfailed=1, deselected=12)
    assert done.ret == 0
    written = (pytester.path / "page.md").read_text(encoding="utf-8")
    assert written[written.index("## Numbers") :] == PAGE
    assert re.search(r"on CPU, with\ntorch \d[\d.]+ and transformers \d[\w.]+\.\n", written)
    done.stdout.fnmatch_lines(["*conformance table: page.md is written*"])
    run("-m", "not gpu")
    assert (pytester.path / "page.md").read_text(encoding="utf-8") == written


def test_page_of_several_processes_is_that_of_one(run, pytester):
    run("-m", "not gpu")
    alone = (pytester.path / "page.md").read_text(encoding="utf-8")
    (pytester.path / "page.md").unlink()
    pytester.makeconftest(CONFTEST)
    plugins = ("-p", "prefixkit.testing.report", "-p", "no:cacheprovider", "-n", "2", "-m", "not gpu")
    done = pytester.runpytest_subprocess(*plugins, "--conformance-table", "page.md")
    done.assert_outcomes(passed=16, skipped=1, xfailed=1)
    assert done.ret == 0
    assert (pytester.path / "page.md").read_text(encoding="utf-8") == alone


def test_page_of_a_gpu_run_has_its_models_only(run, pytester):
    assert run("-m", "gpu", "-k", "TestOnGPU").ret == 0
    written = (pytester.path / "page.md").read_text(encoding="utf-8")
    assert "on CUDA" in written
    assert "| Runs on many devices | ✓ |" in written
    assert "Odd" not in written


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ((), ('"a `known` bug"', '"cured"'), None),
        (("-m", "not gpu"), ('wrong = ("two", "float16")', ""), "the run failed"),  # an unexpected pass
        (("-m", "not gpu"), ("deviations = {", "others = {"), "the run failed"),
        (("-m", "not gpu and not slow"), ("", ""), "8 tests did not run, such as test_a.py::TestPlain::test_tr"),
        (("-m", "not gpu"), ("TestOdd", "TestPlain"), "two classes are named TestPlain"),
        (("-k", "nothing"), ("", ""), "no conformance test ran|the run failed"),
    ],
    ids=["all", "strict", "failed", "deselected", "same name", "nothing"],
)
def test_page_is_written_only_if_it_is_whole(run, pytester, arguments, change, message):
    done = run(*arguments, change=change)
    assert (done.ret == 0) is (message is None)
    assert (pytester.path / "page.md").exists() is (message is None)
    said = "page.md is written" if message is None else f"page.md is not written: ({message})"
    assert re.search(said, done.stdout.str())


def test_no_option_no_table(pytester):
    pytester.makepyfile("def test_nothing(): pass")
    done = pytester.runpytest_inprocess("-p", "prefixkit.testing.report")
    assert done.ret == 0
    assert "conformance table" not in done.stdout.str()


def test_errors_that_differ_in_a_class_name_only_are_one():
    def text_of(**reasons):
        results = [
            table.Result(model=model, test="test_greedy", on_cache=True, settings={}, outcome=table.RAISES, reason=text)
            for model, texts in reasons.items()
            for text in texts
        ]
        return [line for line in table._refusals(results, "Heading") if line.startswith("“")]

    assert text_of(A=["no FSDPGPT2Model"], B=["no LlamaAttention"]) == ["“no …”"]
    assert text_of(A=["no StaticCache"], B=["no StaticCache"]) == ["“no StaticCache”"]
    assert text_of(A=["no StaticCache", "no OtherCache"], B=["no StaticCache"]) == [
        "“no StaticCache”",
        "“no OtherCache”",
    ]


def test_settings_are_told_apart_by_as_few_as_possible():
    def result(**settings):
        return table.Result(model="A", test="test", on_cache=False, settings=settings, outcome=table.RIGHT)

    grid = [result(side=side, dtype=dtype) for side in "lr" for dtype in "abc"]
    assert table.settings_of(grid, grid) == ""
    assert table.settings_of(grid[:3], grid) == "side l"
    assert table.settings_of([grid[0], grid[1], grid[3], grid[4]], grid) == "dtype a or dtype b"
    assert table.settings_of(grid[:2], grid) == "side l, dtype a or side l, dtype b"


def conformance_classes():
    """Names of the classes that the suite runs on a CPU, read from its files without running them."""
    found, of_kit = [], {"Conformance"}
    for file in [*ROOT.glob("plugins/*/tests/*.py"), *ROOT.glob("tests/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in (part for outer in tree.body for part in (outer.body if isinstance(outer, ast.If) else [outer])):
            if ast.unparse(node) == "pytestmark = pytest.mark.gpu":
                break
            if isinstance(node, ast.ClassDef) and of_kit & {ast.unparse(base) for base in node.bases}:
                of_kit.add(node.name)
                found += [node.name] if node.name.startswith("Test") and not is_rare(node) else []
    return found


def is_rare(node):
    """Whether a class is left out of the table."""
    marks = [*node.decorator_list, *(part for part in node.body if isinstance(part, ast.Assign))]
    return any("pytest.mark.rare" in ast.unparse(mark) for mark in marks)


def test_page_in_the_docs_has_every_mode_and_model():
    """If it has not: ``nox -s conformance``."""
    written = (ROOT / "docs/reference/conformance.md").read_text(encoding="utf-8")
    heads = {row for row in written.splitlines() if row.startswith("| mode |")}
    assert len(heads) == 1
    columns = [head.strip() for head in heads.pop().split("|")[2:-1]]
    assert sorted(columns) == sorted(name.removeprefix("Test") for name in conformance_classes())
    sentences = map(table.plain, table.modes().values())
    assert [
        sentence for sentence in sentences if not re.search(rf"^(\| |- ){re.escape(sentence)}", written, re.MULTILINE)
    ] == []
    rows = set(re.findall(r"^\| (.+?) \| (?:✓|raises|partly|not run|–|\[\^)", written, re.MULTILINE))
    assert rows <= set(map(table.plain, table.modes().values()))
