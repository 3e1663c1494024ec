"""A plugin made from the template is whole, has its own name everywhere, and passes its tests."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefixkit
from prefixkit.template import TEMPLATE, make_plugin
from prefixkit.template.__main__ import main
from prefixkit.testing import Conformance

ROOT = Path(__file__).parents[1]
CORE = "installed or tiny_model or sites_are or every_slot or prefix_of_a_text"
"""A few seconds of the kit's tests, and the two of the template itself."""


def install(folder, target):
    """What pip does for a module: the entry points of ``pyproject.toml`` end up beside it."""
    content = (folder / "pyproject.toml").read_text()
    name, version = (re.search(rf'^{field} = "(.*)"$', content, re.MULTILINE)[1] for field in ("name", "version"))
    (module,) = folder.glob("*_*.py")
    (target / module.name).write_text(module.read_text())
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    group = content.partition("[project.entry-points.prefixkit]\n")[2].partition("\n\n")[0]
    entries = [line.partition("#")[0].replace('"', "") for line in group.splitlines()]
    (info / "entry_points.txt").write_text("\n".join(["[prefixkit]", *entries, ""]))


def test_what_is_made_passes_its_tests(tmp_path):
    folder = make_plugin("Other-kind_2.5", tmp_path / "plugin")
    target = tmp_path / "target"
    target.mkdir()
    install(folder, target)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", CORE)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    counts = re.search(r"(\d+) passed, \d+ deselected, 1 xfailed", done.stdout)
    assert int(counts[1]) > 10, done.stdout


def test_every_file_is_there_and_nothing_keeps_the_made_up_name(tmp_path):
    folder = make_plugin("new_kind", tmp_path / "plugin")
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert sorted(files) == [
        ".github/workflows/release.yml",
        ".github/workflows/tests.yml",
        ".gitignore",
        "LICENSE",
        "README.md",
        "conftest.py",
        "prefixkit_new_kind.py",
        "pyproject.toml",
        "tests/test_prefixkit_new_kind.py",
    ]
    assert [name for name, text in files.items() if re.search("my.?type", text, re.IGNORECASE)] == []
    assert 'name = "prefixkit-new-kind"' in files["pyproject.toml"]
    assert '\nnew_kind = "prefixkit_new_kind"' in files["pyproject.toml"]
    assert "class TestNewKind(Conformance)" in files["tests/test_prefixkit_new_kind.py"]


def test_it_is_the_plugin_that_the_documentation_explains():
    """Line by line, but for comments and the refusal that only GPT-2 needs."""

    def body(path):
        (function,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "stacks")
        return [ast.dump(node) for node in function.body[1:] if not isinstance(node, ast.If)]

    assert body(TEMPLATE / "prefixkit_mytype.py") == body(ROOT / "plugins/prefixkit-gpt2/prefixkit_gpt2.py")


def test_the_readme_names_tests_that_there_are():
    names = re.findall(r"`(test_\w+)`", (TEMPLATE / "README.md").read_text())
    assert names
    assert [name for name in names if not hasattr(Conformance, name)] == []


@pytest.mark.parametrize("name", ["", "../x", "my type", "-x", "prefixkit/x", "x-"])
def test_what_is_no_type_is_refused(name, tmp_path):
    with pytest.raises(prefixkit.PluginError, match=f"^{re.escape(repr(name))} is no model type; pass what config.mod"):
        make_plugin(name, tmp_path / "plugin")
    assert list(tmp_path.iterdir()) == []


def test_a_second_plugin_for_a_type_is_refused(tmp_path):
    with pytest.raises(prefixkit.PluginError, match="^prefixkit-gpt2, which is installed, serves model type 'gpt2'; "):
        make_plugin("gpt2", tmp_path / "plugin")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["template", "new-kind"])
    assert main() == 0
    assert capsys.readouterr().out.startswith(
        "the plugin prefixkit-new-kind is in prefixkit-new-kind; its README.md says"
    )
    mine = tmp_path / "prefixkit-new-kind/prefixkit_new_kind.py"
    mine.write_text("mine")
    assert main() == 1
    assert "error: 'prefixkit-new-kind' is there already; name another --destination" in capsys.readouterr().err
    assert mine.read_text() == "mine"
