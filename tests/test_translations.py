"""The Chinese pages keep step with the English ones in code, headings and links; pictures have words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = [(ROOT / "README.md", ROOT / "README.zh.md"), (ROOT / "docs/tutorial.md", ROOT / "docs/zh/tutorial.md")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(^|  )#.*$", re.MULTILINE)
"""Comments are translated; no string in these pages looks like one."""
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def read(page):
    return page.read_text(encoding="utf-8")


def code(text):
    return [(language, COMMENT.sub("", block)) for language, block in BLOCK.findall(text)]


def levels(text):
    return [len(marks) for marks in re.findall(r"^(#+) ", BLOCK.sub("", text), re.MULTILINE)]


def files(page):
    """Pictures, and pages that are linked, from the root."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", BLOCK.sub("", read(page)))
    return [(page.parent / target).resolve().relative_to(ROOT) for target in targets]


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=["readme", "tutorial"])
def test_code_and_headings_are_the_same(english, chinese):
    assert code(read(english)) == code(read(chinese))
    assert levels(read(english)) == levels(read(chinese))


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=["readme", "tutorial"])
def test_links_lead_to_the_same_places(english, chinese):
    """Or to their translations; each page links to the other."""
    pairs = {first.relative_to(ROOT): second.relative_to(ROOT) for first, second in PAIRS}
    assert pairs[english.relative_to(ROOT)] in files(english)
    assert english.relative_to(ROOT) in files(chinese)
    own = set(pairs) | set(pairs.values())
    assert [one for one in files(english) if one not in own] == [one for one in files(chinese) if one not in own]
    assert [file for file in files(chinese) if not (ROOT / file).exists()] == []


def test_only_comments_may_differ():
    text = read(ROOT / "README.md")
    assert code(text) == code(text.replace("# in place; the base is frozen", "# 就地修改"))
    assert code(text) != code(text.replace("num_virtual_tokens=20", "num_virtual_tokens=21"))
    assert code(text) != code(text.replace("gpt2 ['decoder', ", "gpt2 ["))
    assert levels(text) != levels(text.replace("## Cite\n", ""))
    assert levels(text) == levels(text.replace("## Cite\n", "## 引用\n"))


@pytest.mark.parametrize("page", [*sum(PAIRS, ()), ROOT / "docs/explanation.md"], ids=lambda page: page.name)
def test_pictures_have_words(page):
    for words, path in IMAGE.findall(read(page)):
        assert len(words) > 20
        assert (page.parent / path).exists()


def test_all_figures_are_shown():
    drawn = {file.name for file in (ROOT / "docs/_static/figures").iterdir()}
    functions = re.search(r"^FIGURES.* = \((.*)\)$", read(ROOT / "docs/figures.py"), re.MULTILINE)[1].split(", ")
    shown = {Path(path).name for _, path in IMAGE.findall(read(ROOT / "docs/explanation.md"))}
    assert drawn == {f"{name}.svg" for name in functions} == shown
