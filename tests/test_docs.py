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
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^<!-- not run: .*? -->\n```", re.MULTILINE)
NEEDS = {"serve-pt2": "5.5", "serve-continuous-batching": "5.23"}
"""The transformers that a page is about."""


def blocks(page):
    """Language and text of each block; one that an HTML comment says is not run is ``shown``."""
    return BLOCK.findall(NOT_RUN.sub("```shown_", page.read_text(encoding="utf-8")))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [page for page in PAGES if "python" in dict(blocks(page))], ids=lambda page: page.stem)
def test_blocks_run_and_print_what_the_page_says(page, monkeypatch):
    """In order, in one namespace, from the root; a ``text`` block is what the block before it prints."""
    if Version(NEEDS.get(page.stem, "0")) > VERSION:
        pytest.skip(f"about transformers {NEEDS[page.stem]} or later")
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {"__name__": "page"}
    printed = None
    for language, code in blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and printed:
            assert printed == code
            printed = None


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
