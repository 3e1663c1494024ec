"""Writes the comparison with other libraries into the READMEs: ``python docs/comparison.py``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml  # transformers brings it

HERE = Path(__file__).parent
PAGES = {"en": HERE.parent / "README.md", "zh": HERE.parent / "README.zh.md"}
COLUMNS = ("prefixkit", "peft", "adapterhub")
PLACE = re.compile(r"(<!-- docs/comparison.py writes this table -->\n).*?(<!-- end -->)", re.DOTALL)


def comparison() -> dict[str, Any]:
    """The data file."""
    data: dict[str, Any] = yaml.safe_load((HERE / "comparison.yaml").read_text(encoding="utf-8"))
    return data


def table(language: str) -> str:
    """The Markdown table in one language."""
    data = comparison()
    versions = data["versions"]
    head = ["", "prefixkit", f"PEFT {versions['PEFT']}", f"AdapterHub `adapters` {versions['adapters']}"]
    rows = [[row["question"][language], *(row[name][language] for name in COLUMNS)] for row in data["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def written(page: str, language: str) -> str:
    """A README with the table in its place."""
    return PLACE.sub(lambda match: f"{match[1]}\n{table(language)}\n\n{match[2]}", page)


def main() -> None:
    """Write both."""
    for language, path in PAGES.items():
        path.write_text(written(path.read_text(encoding="utf-8"), language), encoding="utf-8")


if __name__ == "__main__":
    main()
