"""Importing is free, and the core knows no architecture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefixkit
from prefixkit.template import TEMPLATE

PACKAGE = Path(prefixkit.__file__).parent
PLUGINS = ("prefixkit_gpt2", "prefixkit_llama", "prefixkit_t5", "prefixkit_bart", "prefixkit_legacy")


@pytest.mark.parametrize(
    "module", ["prefixkit", "prefixkit.hookspecs", "prefixkit.discovery", "prefixkit.template", *PLUGINS]
)
def test_import_brings_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_listing_plugins_brings_neither():
    code = (
        "import sys, prefixkit; prefixkit.plugins(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_architecture_is_named_in_the_core():
    families = r"gpt|llama|\bt5\b|\bbart\b|bert|mistral|mixtral|qwen|gemma|\bphi|olmo|falcon|bloom|\bopt\b|whisper"
    # llama.cpp is a program that runs every architecture, as is its llama-server.
    program = re.compile(r"llama[._-](cpp|server)", re.IGNORECASE)
    inside = families.replace("llama|", "")
    hits = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if TEMPLATE not in path.parents  # a plugin, which only lies there
        for line in path.read_text().splitlines()
        if re.search(inside if path.parent.name == "llama_cpp" else families, program.sub("", line), re.IGNORECASE)
    ]
    assert not hits


def test_only_one_module_touches_what_transformers_hides():
    hidden = re.compile(
        r"\._attn_implementation|_gradient_checkpointing_func|masking_utils|ALL_ATTENTION|modeling_utils"
    )
    users = {path.name for path in PACKAGE.rglob("*.py") if hidden.search(path.read_text())}
    assert users == {"transformers_internals.py"}


def test_every_public_name_is_there():
    for name in prefixkit.__all__:
        assert getattr(prefixkit, name) is not None
    assert set(prefixkit.__all__) <= set(dir(prefixkit))
    with pytest.raises(AttributeError, match="^module 'prefixkit' has no attribute 'aply'$"):
        prefixkit.aply  # noqa: B018
