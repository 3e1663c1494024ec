"""Every Python block of README and docs runs; every public name and hook has its place."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from packaging.version import Version
from versions import VERSION

import prefixkit
from prefixkit import hookspecs

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^(<!--[^\n]*-->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \w.* -->\n")
NEEDS = {"serve-pt2": "5.5", "serve-continuous-batching": "5.23"}
"""The transformers that a page is about."""


def blocks(page):
    """The comment directly before it, if there is one, the language and the code of each block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page):
    """Run its Python blocks in order, in one namespace; a ``text`` block is what the block before it prints.

    A block with the comment ``<!-- not run: reason -->`` is compiled only.
    """
    namespace: dict[str, object] = {"__name__": "page"}
    printed = None
    for comment, language, code in blocks(page):
        if language == "python":
            program = compile(code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec("" if NOT_RUN.fullmatch(comment) else program, namespace)
            printed = out.getvalue()
        elif language == "text" and printed:
            assert printed == code
            printed = None


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(language == "python" for _, language, _ in blocks(page))],
    ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix(),
)
def test_blocks_run_and_print_what_the_page_says(page, monkeypatch):
    """From the root of the repository."""
    if Version(NEEDS.get(page.stem, "0")) > VERSION:
        pytest.skip(f"about transformers {NEEDS[page.stem]} or later")
    monkeypatch.chdir(ROOT)
    run(page)


def test_a_block_that_is_not_run_says_why_and_compiles(tmp_path):
    comments = [comment for page in PAGES for comment, language, _ in blocks(page) if comment and language == "python"]
    assert [comment for comment in comments if not NOT_RUN.fullmatch(comment)] == []
    page = tmp_path / "page.md"
    for comment in ("<!-- not run -->\n", "<!-- not run: -->\n", "<!-- not run: needs trl -->\n\n", ""):
        page.write_text(f"{comment}```python\n1 / 0\n```\n", encoding="utf-8")
        with pytest.raises(ZeroDivisionError):
            run(page)
    page.write_text("<!-- not run: needs trl -->\n```python\n1 / 0\n```\n", encoding="utf-8")
    run(page)
    page.write_text("<!-- not run: needs trl -->\n```python\n1 /\n```\n", encoding="utf-8")
    with pytest.raises(SyntaxError):
        run(page)


def test_every_public_name_and_hook_has_its_place():
    api = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    names = [name for name in prefixkit.__all__ if not name.startswith("__")]
    assert [name for name in names if not re.search(rf"\b{name}\b", api)] == []
    hooks = (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")
    assert [name for name in vars(hookspecs) if name.startswith("prefixkit_") and name not in hooks] == []


def test_every_error_is_documented_where_it_is_raised():
    """The docstrings of the public functions name the errors of this package that they raise."""
    for name in (
        "apply",
        "save",
        "load",
        "disabled",
        "fold",
        "remove",
        "to_cache",
        "export",
        "sites",
        "config",
        "activate",
        "rows",
        "compose",
        "average",
    ):
        assert "Raises:" in getattr(prefixkit, name).__doc__, name


def test_links_between_pages_lead_somewhere():
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert missing == []
