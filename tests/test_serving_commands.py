"""``prefixkit export`` and ``prefixkit verify``, and the plain file that every program may read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spoiled import spoil
from transformers import AutoTokenizer
from versions import since

import prefixkit
from prefixkit import cli
from prefixkit.exporting import HEADER
from prefixkit.serving import keys_and_values as kv, pt2
from prefixkit.serving.prefix_file import PREFIX, read_prefix
from prefixkit.serving.targets import TARGETS, Target
from prefixkit.testing.subject import strengthen

TOKENIZER = Path(__file__).parents[1] / "examples/gpt2-e2e-base"
TOKENS, PROMPT, NEW = 5, (11, 12, 13, 14), 6
TEXT = "name : Zizzi | food : Chinese"


def with_prefix(model, **options):
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, "window": "slide", **options})
    strengthen(model)
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folders of a LLaMA with grouped queries that reads text, and of its prefix."""
    base, prefix = (tmp_path_factory.mktemp(name) for name in ("base", "prefix"))
    model = tiny.make("llama", vocab_size=2048)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(base)
    prefixkit.save(with_prefix(model), prefix)
    return base, prefix


def command(capsys, *arguments):
    """The exit code, and the lines on stdout and stderr."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


NEEDS = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "llama.cpp": ["gguf", "llama_cpp"]}
"""Packages, which sessions of nox lay over."""


@pytest.mark.parametrize(
    ("target", "options", "ways"),
    [
        ("kv", (), ["kv"]),
        ("kv", ("--positions", "none"), ["kv"]),
        pytest.param(
            *("pt2", ("--max-cache-len", 64), ["pt2"]),
            marks=[pytest.mark.slow, since("5.5", "static caches count")],
        ),
        pytest.param(
            *("onnx", ("--baked",), ["onnx (model.onnx)", "onnx (with_prefix.onnx)"]),
            marks=pytest.mark.slow,
        ),
        ("llama.cpp", (), [f"llama.cpp (prefix.{layout}.bin)" for layout in ("f32", "f32.flash", "f16", "f16.flash")]),
    ],
)
@pytest.mark.filterwarnings("default")  # of the exporters
def test_export_and_verify(target, options, ways, places, tmp_path, capsys):
    base, prefix = places
    for package in NEEDS.get(target, ()):
        pytest.importorskip(package, reason=f"`nox -s {target.replace('.', '_')}` has {package}")
    runs_on = ()
    if target == "llama.cpp":
        to_gguf = pytest.importorskip("to_gguf")
        model = tiny.transformers.LlamaForCausalLM.from_pretrained(base)
        runs_on = ("--gguf", to_gguf.convert(model, tmp_path / "base.gguf"))
    place = tmp_path / "out"
    code, out, err = command(capsys, "export", prefix, place, "--to", target, "--base", base, *options, *runs_on)
    assert code == 0, err
    assert out[0].startswith(f"p-tuning-v2, {TOKENS} virtual tokens for llama: wrote ")
    code, out, err = command(capsys, "verify", prefix, place, TEXT, "name : Aromi", "--base", base, *runs_on)
    assert code == 0, err
    assert [line.split(": ")[0] for line in out] == ways * 2
    # In float16 two tokens of random weights may be as good as equal; verify looks at that.
    assert all(": 16 of 16 greedy tokens equal; largest difference" in line for line in out if "f16" not in line)


def test_another_prefix_is_found_by_verify(places, tmp_path, capsys):
    base, prefix = places
    model = with_prefix(tiny.make("llama", vocab_size=2048), init="zeros")
    with torch.no_grad():
        next(model.prefixkit.parameters()).neg_()
    prefixkit.export(model, tmp_path / "other")
    code, _, err = command(capsys, "verify", prefix, tmp_path / "other", TEXT, "--base", base)
    assert code == 1
    assert err[-1].startswith("prefixkit: error: the prefix is there and is not read as it should be (kv: ")


def test_what_verify_cannot_run(places, tmp_path, capsys):
    base, prefix = places
    (tmp_path / "two").mkdir()
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / "two" / name).touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "damaged").write_text("x")
    for place, says in {
        "two": r".*two' was written for more than one program \(onnx, pt2\); .*",
        "none": r".*none' has none of llama_cpp.json \(llama.cpp\), vllm.json \(vllm\), model.onnx \(onnx\), .*; .*",
        "nowhere": r".*nowhere' is not there; name what `prefixkit export` wrote",
        "damaged": r".*damaged is damaged or no safetensors file: .*",
    }.items():
        code, out, err = command(capsys, "verify", prefix, tmp_path / place, TEXT, "--base", base)
        assert (code, out) == (1, [])
        assert re.fullmatch(f"prefixkit: error: {says}", err[-1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["onnx", "--gguf", "x"], "--gguf is for llama.cpp, and this is for onnx"),
        (["kv", "--baked"], "--baked is for onnx, and this is for kv"),
        (["pt2", "--positions", "none"], "--positions is for kv, and this is for pt2"),
        (["llama.cpp", "--gguf", "x", "--max-cache-len", "9"], "--max-cache-len is for pt2, and this is for llama.cpp"),
        (["llama.cpp"], "llama.cpp needs --gguf, the file of the base that it runs"),
        (["gguf"], "argument --to: invalid choice: 'gguf' .*"),
    ],
)
def test_an_option_of_another_target_is_refused(arguments, says, places, tmp_path, capsys):
    base, prefix = places
    code, out, err = command(capsys, "export", prefix, tmp_path / "out", "--base", base, "--to", *arguments)
    assert (code, out) == (1, [])
    assert re.fullmatch(f"prefixkit: error: {says}", err[-1])
    assert not (tmp_path / "out").exists()


def test_options_of_vllm_are_an_object(places, tmp_path, capsys):
    base, prefix = places
    for wrong in ("dtype=float32", "[1]"):
        code, _, err = command(capsys, "verify", prefix, tmp_path, TEXT, "--base", base, "--engine", wrong)
        assert code == 1
        assert err[-1].startswith(f"prefixkit: error: argument --engine: {wrong!r} is not a JSON object, such as '{{")


def test_a_target_in_a_package_that_is_missing(places, tmp_path, capsys, monkeypatch):
    base, prefix = places
    monkeypatch.setitem(TARGETS, "kv", Target("no_such_package.part", distribution="prefixkit-such"))
    code, _, err = command(capsys, "export", prefix, tmp_path / "out", "--base", base, "--to", "kv")
    assert code == 1
    assert err[-1].endswith("that is served by prefixkit-such; pip install prefixkit-such")


@pytest.mark.parametrize("target", [target for name, target in TARGETS.items() if target.distribution == "prefixkit"])
def test_every_target_is_known_again(target, places):
    """The mark is a file that ``write`` writes, and the module has all that the command line calls."""
    serving = target.serving()
    assert all(callable(getattr(serving, name)) for name in ("write", "runs", "verify"))
    marks = [value for value in vars(serving).values() if value == target.mark]
    assert marks or not target.mark


def test_a_checkpoint_is_not_written_over(places):
    """Both are called prefix.safetensors, and only one of them can be loaded again."""
    _, prefix = places
    before = (prefix / PREFIX).read_bytes()
    model = with_prefix(tiny.make("llama", vocab_size=2048))
    with pytest.raises(prefixkit.CheckpointError, match="it is a checkpoint, which prefixkit.load could not read"):
        prefixkit.export(model, prefix / PREFIX)
    assert (prefix / PREFIX).read_bytes() == before


# the plain file


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "mistral"])
def test_the_file_says_all_of_the_prefix(name, tmp_path):
    """Gemma's windows are of 4 tokens, so that the prefix slides out of them."""
    model = with_prefix(tiny.make(name))
    prefixkit.export(model, tmp_path / PREFIX)
    verdict = kv.verify(model, tmp_path / PREFIX, PROMPT, NEW)
    assert (verdict.equal, verdict.tokens) == (NEW, NEW)
    assert verdict.with_prefix < 1e-4 < verdict.effect


def swapped(tensors):
    """Keys and values of two layers exchanged."""
    turned = {"decoder.0": "decoder.1", "decoder.1": "decoder.0"}
    return {turned.get(name[:9], name[:9]) + name[9:]: value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped, "not read as it should be"),
        (
            lambda tensors: {
                name: value - 1e4 if name.endswith("key") else value * 0 for name, value in tensors.items()
            },
            "the prefix is",
        ),
        (lambda tensors: {name: value.flip(0).contiguous() for name, value in tensors.items()}, "not read as"),
    ],
    ids=["layers", "hidden", "heads"],
)
def test_a_file_that_says_something_else(change, says, tmp_path):
    model = with_prefix(tiny.make("llama"))
    prefixkit.export(model, tmp_path / PREFIX)
    spoil(tmp_path, change)
    with pytest.raises(prefixkit.VerificationError, match=says):
        kv.verify(model, tmp_path / PREFIX, PROMPT, NEW)


def test_a_file_that_puts_the_text_elsewhere(tmp_path):
    model = with_prefix(tiny.make("llama"))
    file = tmp_path / PREFIX
    prefixkit.export(model, file)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()[HEADER])
    header["text_starts_at"]["decoder"] = 0
    save_file(load_file(file), file, {HEADER: json.dumps(header)})
    with pytest.raises(prefixkit.VerificationError, match="not read as it should be"):
        kv.verify(model, file, PROMPT, NEW)


def test_what_the_bare_model_cannot_run(tmp_path):
    file = tmp_path / PREFIX
    for name, options, says in [
        ("mistral", {"window": "pinned"}, "the bare model cannot run this file: .*sliding window"),
        ("llama", {"head": ["lm_head"]}, r"the head \(lm_head\) trained with the prefix, and the bare model has"),
    ]:
        model = with_prefix(tiny.make(name), **options)
        prefixkit.export(model, file)
        with pytest.raises(prefixkit.EngineError, match=says):
            kv.verify(model, file, PROMPT, NEW)
    other = with_prefix(tiny.make("llama", num_hidden_layers=2))
    with pytest.raises(prefixkit.CheckpointError, match="has 3 layers .* and the model 2"):
        kv.verify(other, file, PROMPT, NEW)
    t5 = with_prefix(tiny.make("t5"))
    prefixkit.export(t5, file)
    with pytest.raises(prefixkit.UnsupportedModelError, match="^T5ForConditionalGeneration attends to an encoder; "):
        kv.verify(t5, file, PROMPT, NEW)
    with pytest.raises(prefixkit.CheckpointError, match="has more than a decoder's prefix"):
        read_prefix(file)


@since("5.5", "static caches count by themselves")
def test_a_graph_has_the_head_of_the_base(tmp_path):
    model = with_prefix(tiny.make("llama"), head=["lm_head"])
    with pytest.raises(prefixkit.EngineError, match=r"the head \(lm_head\) trained with the prefix, and the graph has"):
        pt2.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_base_is_left_alone(places, capsys):
    base, prefix = places
    before = sorted(file.name for file in base.iterdir())
    code, out, err = command(capsys, "export", prefix, base, "--to", "vllm", "--overwrite", "--base", base)
    assert (code, out) == (1, [])
    assert err[-1].endswith("is where the base comes from; name another place")
    assert sorted(file.name for file in base.iterdir()) == before


def test_only_what_was_written_is_told(places, tmp_path, capsys):
    base, prefix = places
    (tmp_path / "notes.txt").write_text("mine")
    _, out, _ = command(capsys, "export", prefix, tmp_path, "--to", "vllm", "--overwrite", "--base", base)
    assert f"wrote {tmp_path}/prefix.safetensors, {tmp_path}/vllm.json (" in out[0]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_text_without_a_token(places, tmp_path):
    model = with_prefix(tiny.make("llama"))
    prefixkit.export(model, tmp_path / PREFIX)
    with pytest.raises(prefixkit.ConfigError, match="the prompt is empty"):
        kv.verify(model, tmp_path / PREFIX, [], NEW)
