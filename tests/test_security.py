"""What SECURITY.md says, where no other test does."""

from __future__ import annotations

import ast
import json
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from test_foreign import HOLDERS, Runs

import prefixkit
from prefixkit import CheckpointError, cli
from prefixkit.checkpoint_files import CONFIG_FILE, TENSOR_FILE
from prefixkit.template import TEMPLATE

PACKAGE = Path(prefixkit.__file__).parent
FILES = [path for path in PACKAGE.rglob("*.py") if TEMPLATE not in path.parents]
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
MODULES_THAT_DO = {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess", "runpy", "ctypes", "code", "imp"}
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub"}


def nodes(kind, files=FILES):
    """Every piece of the package's code of one kind, with its file."""
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield str(path.relative_to(PACKAGE)), node


def called(name):
    """Calls of anything of that name, with their keyword arguments."""
    for file, call in nodes(ast.Call):
        if getattr(call.func, "attr", getattr(call.func, "id", None)) == name:
            yield file, {word.arg: ast.unparse(word.value) for word in call.keywords}


def imported(modules):
    """Files that import one of these modules, anywhere in them."""
    for file, node in nodes((ast.Import, ast.ImportFrom)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        if {name.partition(".")[0] for name in names} & modules:
            yield file


def test_pickles_are_read_in_one_place_and_for_their_tensors():
    calls = [(file, ast.unparse(call)) for file, call in nodes(ast.Call) if ast.unparse(call.func) == "torch.load"]
    assert calls == [("formats/tensor_files.py", "torch.load(path, map_location='cpu', weights_only=True)")]
    assert set(imported(MODULES_THAT_DO - {"ctypes"})) == {"testing/workers.py"}
    assert set(imported({"ctypes"})) == {"serving/llama_cpp/running.py"}  # calls llama.cpp, which takes C's numbers


def test_no_text_is_run_as_code():
    assert [
        (file, call.func.id)
        for file, call in nodes(ast.Call)
        if isinstance(call.func, ast.Name) and call.func.id in RUNS_CODE
    ] == []


def test_models_are_loaded_without_their_code():
    calls = [(name, *call) for name in ("from_pretrained", "from_config") for call in called(name)]
    calls = [call for call in calls if not call[1].startswith("testing/")]  # there, models of the test's own
    assert len(calls) > 3
    assert [call for call in calls if call[2].get("trust_remote_code") != "False"] == []


def test_one_module_speaks_with_the_hub():
    servers = {"serving/llama_cpp/server.py"}  # at an address that the user gives
    assert set(imported(NETWORK)) == {"hub.py", "model_card.py", *servers}
    assert set(called("validate")) == set(), "of a card, that asks the hub"


def test_what_is_here_needs_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it wanted to connect"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model = tiny.make("gpt2")
    model.save_pretrained(tmp_path / "base")
    prefixkit.save(prefixkit.apply(model, num_virtual_tokens=2), tmp_path / "prefix")
    prefixkit.load(prefixkit.remove(model), tmp_path / "prefix")
    assert cli.main(["inspect", str(tmp_path / "base")]) == 0, capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "prefix")]) == 0, capsys.readouterr().err


def test_beside_a_checkpoint_of_ours_nothing_else_is_opened(tmp_path, monkeypatch):
    prefixkit.save(prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=2), tmp_path)
    for name in {*HOLDERS.values(), "training_args.bin"}:
        (tmp_path / name).write_bytes(pickle.dumps(Runs(tmp_path / "it-ran")))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    prefixkit.load(tiny.make("gpt2"), tmp_path)
    assert not (tmp_path / "it-ran").exists()


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The name of a module that can be imported, and must not be."""
    (tmp_path / "on_the_path").mkdir()
    (tmp_path / "on_the_path" / "prefixkit_trap.py").write_text("prefixkit_methods = build = None")
    monkeypatch.syspath_prepend(str(tmp_path / "on_the_path"))
    yield "prefixkit_trap"
    assert "prefixkit_trap" not in sys.modules


@pytest.mark.parametrize("ending", ["", ":build", ".build"])
def test_a_checkpoint_names_no_module(ending, trap, tmp_path):
    folder = tmp_path / "prefix"
    prefixkit.save(prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=2), folder)
    changed = {**json.loads((folder / CONFIG_FILE).read_text()), "method": trap + ending}
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE, {"prefixkit": json.dumps(changed)})
    (folder / CONFIG_FILE).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=f"no method '{trap}{ending}'"):
        prefixkit.load(tiny.make("gpt2"), folder)


def test_a_class_that_pefts_file_names_is_not_looked_for(trap, tmp_path):
    prefixkit.save(prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=2), tmp_path / "peft", format="peft")
    path = tmp_path / "peft" / "adapter_config.json"
    mapping = {"base_model_class": "build", "parent_library": trap}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": mapping}))
    prefixkit.load(tiny.make("gpt2"), tmp_path / "peft")


def test_plugins_are_imported_when_their_type_is_there_and_no_others():
    code = """if True:
        import sys
        import prefixkit
        from transformers import GPT2Config, GPT2LMHeadModel

        def plugins():
            return sorted(name for name in sys.modules if name.startswith("prefixkit_"))

        print(plugins())
        prefixkit.apply(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), num_virtual_tokens=1)
        print(plugins())
        prefixkit.plugins()
        print(len(plugins()) > 4)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['prefixkit_gpt2']", "True"]


def test_what_is_named_there_is_there():
    """The tests that SECURITY.md leans on, and the mark by which the release waits for an address."""
    root = Path(__file__).parents[1]
    text = (root / "SECURITY.md").read_text()
    for name in ("test_security", "test_foreign", "test_cli", "test_hub", "test_discovery"):
        assert f"`tests/{name}.py`" in text
        assert (root / f"tests/{name}.py").is_file()
    release = (root / ".github/workflows/release.yml").read_text()
    assert "grep -rn 'PUT AN ADDRESS HERE' CODE_OF_CONDUCT.md SECURITY.md" in release
