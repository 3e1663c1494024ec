"""The command line: in this process where possible, and as a process for what importing costs."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)
from versions import since, within

import prefixkit
from prefixkit import cli, discovery, text_to_text
from prefixkit.assembly import stacks_of
from prefixkit.cli import table
from prefixkit.generic import stacks as generic
from prefixkit.weightless import weightless

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples/gpt2-e2e-base"
TOKENS = 4
BERT = pytest.param("bert", marks=since("5.0", "it is off the interface"))
COMMANDS = ("plugins", "inspect", "train", "generate", "convert", "export", "verify")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command that ends well, and gives what it prints."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def refused(capsys):
    """Runs a command that ends with exit code 1, and gives its one message."""

    def call(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert lines[-1].startswith("prefixkit: error: ")
        assert "Traceback" not in captured.err
        return lines[-1].removeprefix("prefixkit: error: ")

    return call


def facts(out):
    """The facts at the top of what ``inspect`` prints."""
    return dict(re.findall(r"^(\S.*?)  +(\S.*)$", out.split("\n\n")[0], re.MULTILINE))


def saved_model(folder, name="gpt2", **changes):
    model = tiny.make(name, **changes)
    model.save_pretrained(folder)
    return model


def saved_prefix(folder, model, **options):
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, **options})
    with torch.no_grad():
        for value in model.prefixkit.parameters():
            value.normal_(generator=torch.Generator().manual_seed(value.numel()))
    prefixkit.save(model, folder)
    return model


def process(*code):
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], *([name, "--help"] for name in COMMANDS), ["trian"]])
def test_what_needs_no_model_imports_no_torch(arguments):
    code = (
        "import sys\nfrom prefixkit.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(' '.join({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    done = process("-c", code, *arguments)
    assert done.returncode == 0, done.stderr


def test_the_command_is_installed_under_its_name():
    content = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nprefixkit = "prefixkit.cli:main"' in content
    done = process("-m", "prefixkit.cli", "--version")
    assert (done.returncode, done.stdout) == (0, f"prefixkit {prefixkit.__version__}\n")
    assert process("-m", "prefixkit.cli", "inspect", "nowhere/at/all").returncode == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main([name, "--help"])
    assert f"example:\n  prefixkit {name}" in capsys.readouterr().out


def test_plugins(run):
    out = run("plugins")
    assert re.search(r"^prefixkit +\S+ +prefix-tuning, p-tuning-v2", out, re.MULTILINE)
    for info in prefixkit.plugins():
        assert re.search(rf"^{info.distribution} +{re.escape(info.version)} ", out, re.MULTILINE)
    assert "broken" not in out


def test_broken_plugins_say_why(run, monkeypatch):
    broken = prefixkit.PluginInfo(
        module="mod", entry_points=("mine",), distribution="bad-one", version="3", error="ImportError: no 'x'"
    )
    monkeypatch.setattr("prefixkit.cli.plugins.plugins", lambda: [broken])
    assert re.search(r"broken plugin.*\nbad-one +3 +mine +ImportError: no 'x'$", run("plugins"), re.MULTILINE)


def test_two_plugins_for_one_type_are_shown(run, monkeypatch):
    monkeypatch.setattr("prefixkit.discovery.Registry.conflicts", lambda _: ["two distributions bring …"])
    assert run("plugins").endswith("\n\nconflict: two distributions bring …\n")


def test_long_cells_are_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "45")
    made = table.table(("a", "words"), [("x", "one two three four five six seven eight nine ten eleven")])
    assert made.splitlines()[1:] == ["x  one two three four five six seven eight", "   nine ten eleven"]


# inspect


def test_inspect_a_model_agrees_with_apply(tmp_path, run):
    model = saved_model(tmp_path, "mistral")
    found = facts(run("inspect", tmp_path, "-P", TOKENS, "--method", "prefix-tuning", "--window", "slide"))
    base = model.num_parameters()
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=TOKENS, window="slide")
    numbers = sum(value.numel() for value in model.prefixkit.parameters())
    flat = TOKENS * sum(site.width for site in prefixkit.sites(model))
    assert found["model"] == f"MistralForCausalLM (mistral), {base:,} parameters"
    assert found["adapter"] == "prefixkit-llama"
    share = 100 * numbers / (base + numbers)
    assert found["prefix"] == f"{numbers:,} parameters, {share:.2f} % of the model; folded {flat:,}"
    assert (found["window"], found["positions"], found["engine"]) == ("slide", "shift", "attention")


T5 = (
    ["encoder", "0-1", "4", "12", "12", "-", "encoder.block.*.layer.*.SelfAttention"],
    ["decoder", "0-2", "4", "12", "12", "-", "decoder.block.*.layer.*.SelfAttention"],
    ["cross", "0-2", "4", "12", "12", "-", "decoder.block.*.layer.*.EncDecAttention"],
)
BART = (
    ["encoder", "0-1", "4", "8", "8", "-", "model.encoder.layers.*.self_attn"],
    ["decoder", "0-2", "2", "16", "16", "-", "model.decoder.layers.*.self_attn"],
    ["cross", "0-2", "2", "16", "16", "-", "model.decoder.layers.*.encoder_attn"],
)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        pytest.param("t5", T5, marks=since("5.15", "the attention engine, and so an encoder prefix, is not for it")),
        ("bart", BART),
    ],
)
def test_inspect_shows_sites_and_engines(name, sites, tmp_path, run):
    saved_model(tmp_path, name)
    out = run("inspect", tmp_path)
    assert [line.split() for line in out.split("\n\n")[1].splitlines()[1:]] == list(sites)
    assert "attention engine: yes\ncache engine: no: " in out
    only = run("inspect", tmp_path, "--stacks", "decoder", "cross")
    assert [line.split()[0] for line in only.split("\n\n")[1].splitlines()[1:]] == ["decoder", "cross"]
    assert "cache engine: yes" in only


@pytest.mark.skipif(not within("4", "5.15"), reason="from transformers 5.15 on both engines serve it")
def test_inspect_of_a_t5_that_the_cache_engine_alone_serves(tmp_path, run, refused):
    saved_model(tmp_path, "t5")
    told = refused("inspect", tmp_path)
    assert "so the attention engine cannot reach it; and the cache engine gives an encoder no prefix" in told
    assert told.endswith("since encoders take no cache; pass stacks=('decoder', 'cross')")
    only = run("inspect", tmp_path, "--stacks", "decoder", "cross")
    assert "attention engine: no: " in only
    assert "cache engine: yes" in only


def test_inspect_reads_no_weights(tmp_path, run):
    saved_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert facts(run("inspect", tmp_path))["prefix"].startswith("3,840 parameters")


def test_inspect_a_task_class_without_a_plugin(tmp_path, run):
    model = tiny.encoder("SequenceClassification")
    model.save_pretrained(tmp_path)
    found = facts(run("inspect", tmp_path, "--num-labels", 5))
    assert found["model"].startswith(f"{type(model).__name__} ({model.config.model_type}), ")
    assert found["adapter"] == "none needed: watched in a forward pass"
    assert found["head that trains"] == "165 parameters"
    found = facts(run("inspect", tmp_path, "--task", "token-classification", "--num-labels", 3))
    other = {task: type(tiny.encoder(task)).__name__ for task in ("TokenClassification", "MaskedLM")}
    assert found["model"].startswith(other["TokenClassification"])
    assert found["head that trains"] == "99 parameters"
    assert facts(run("inspect", tmp_path, "--task", other["MaskedLM"]))["head that trains"] == "none"


def test_inspect_a_saved_prefix(tmp_path, run):
    saved_prefix(tmp_path, tiny.make("llama"), positions="none", layers=[0, 2], name="mine")
    found = facts(run("inspect", tmp_path))
    assert found["prefix"] == "mine"
    assert (found["virtual tokens"], found["positions"], found["window"]) == ("4", "none", "pinned")
    assert found["numbers"] == f"{TOKENS * 2 * 2 * 16:,}"
    assert "embedding.weight  (4, 64)" in run("inspect", tmp_path)


@pytest.mark.parametrize("large", [(2, 2**28), (2, 2)])
@pytest.mark.parametrize("name", ["gpt2", "llama", BERT, "bart", "opt"])
def test_a_model_without_weights_looks_like_the_model(name, large, monkeypatch):
    """With weights that share their numbers, a watched forward pass tells the same, positions included."""
    monkeypatch.setattr("prefixkit.weightless.LARGE", large[0])
    monkeypatch.setattr("prefixkit.weightless.HUGE", large[1])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 4}
    opt = OPTConfig(vocab_size=60, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    model = OPTForCausalLM(opt) if name == "opt" else tiny.make(name)
    fake = weightless(type(model), model.config)
    adapter = generic.generic_adapter()
    assert stacks_of(fake, adapter) == stacks_of(model, adapter)
    storages = {value.untyped_storage().data_ptr() for value in fake.parameters()}
    assert len(storages) < len(list(fake.parameters())) or large == (2, 2)


# convert


@pytest.mark.parametrize("positions", ["shift", "none"])
def test_convert_to_plain_keys_and_values(positions, tmp_path, run):
    """Without the base's weights, the file is the one that ``export`` writes with them."""
    saved_model(tmp_path / "base", "llama")
    model = saved_prefix(tmp_path / "prefix", tiny.make("llama"), method="prefix-tuning")
    out = run(
        *("export", tmp_path / "prefix", tmp_path / "kv.safetensors", "--to", "kv"),
        *("--base", tmp_path / "base", "--positions", positions),
    )
    assert out.startswith("prefix-tuning, 4 virtual tokens for llama: wrote ")
    prefixkit.export(model, tmp_path / "right.safetensors", positions=positions)
    found, right = (load_file(tmp_path / f"{name}.safetensors") for name in ("kv", "right"))
    assert found.keys() == right.keys()
    assert all(torch.allclose(found[name], right[name], atol=1e-5) for name in right)


def test_convert_to_peft_and_back(tmp_path, run):
    saved_model(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    model = saved_prefix(tmp_path / "prefix", model, method="prefix-tuning")
    expected = tiny.logits(model, **tiny.inputs(model))
    run("convert", tmp_path / "prefix", tmp_path / "peft", "--to", "peft")  # the prefix names its base
    assert (tmp_path / "peft/adapter_config.json").is_file()
    run("convert", tmp_path / "peft", tmp_path / "again", "--to", "prefixkit", "--base", tmp_path / "base")
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    prefixkit.load(fresh, tmp_path / "again")
    assert torch.allclose(tiny.logits(fresh, **tiny.inputs(fresh)), expected, atol=1e-5)


def test_convert_what_the_base_has_to_read(tmp_path, run):
    """Prompt tuning's keys and values come out of the base, so it is read after all."""
    saved_model(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    model = saved_prefix(tmp_path / "prefix", model, method="prompt-tuning")
    run("export", tmp_path / "prefix", tmp_path / "kv.safetensors", "--to", "kv")
    prefixkit.export(model, tmp_path / "right.safetensors")
    found, right = (load_file(tmp_path / f"{name}.safetensors") for name in ("kv", "right"))
    assert all(torch.allclose(found[name], right[name], atol=1e-5) for name in right)


def test_convert_folds_and_keeps_a_head(tmp_path, run):
    torch.manual_seed(0)
    made = tiny.encoder("SequenceClassification", num_labels=5)
    made.save_pretrained(tmp_path / "base")
    model = type(made).from_pretrained(tmp_path / "base").eval()
    saved_prefix(tmp_path / "prefix", model, method="prefix-tuning", encoder_hidden_size=8)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    prefixkit.save(model, tmp_path / "prefix")
    run("convert", tmp_path / "prefix", tmp_path / "folded", "--to", "prefixkit", "--fold")
    fresh = type(made).from_pretrained(tmp_path / "base").eval()
    prefixkit.load(fresh, tmp_path / "folded")
    ids = tiny.tokens(2, 5)
    assert prefixkit.config(fresh).folded
    assert torch.allclose(tiny.logits(fresh, input_ids=ids), tiny.logits(model, input_ids=ids), atol=1e-6)


def test_convert_overwrites_only_if_asked(tmp_path, run, refused):
    saved_model(tmp_path / "base")
    saved_prefix(tmp_path / "prefix", tiny.make("gpt2"))
    arguments = ["export", tmp_path / "prefix", tmp_path / "kv", "--to", "kv", "--base", tmp_path / "base"]
    run(*arguments)
    assert refused(*arguments).endswith("/kv' is there already; name another place, or pass --overwrite")
    run(*arguments, "--overwrite")


# train and generate


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a tiny model that reads text, and pairs."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("gpt2", "bart"):
        tiny.make(name, vocab_size=2048).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)
    rows = [json.dumps({"source": f"what is {n}", "target": f"it is {n}"}) for n in range(8)]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_train_and_generate(name, text, tmp_path, run):
    pairs = text / "pairs.jsonl"
    out = run(
        *("train", text / name, "--train", pairs, "--test", pairs, "--max-test", 3, "-P", TOKENS),
        *("--epochs", 1, "--batch-size", 4, "--output", tmp_path / "prefix"),
    )
    assert re.search(r"^p-tuning-v2: [\d,]+ trainable numbers, \d+\.\d\d % of the model$", out, re.MULTILINE)
    assert re.search(r"^BLEU on 3 test inputs: \d+\.\d before, \d+\.\d after$", out, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix"], "what Trainer writes is cleared away"
    sentences = re.findall(r"^  generated  (.*)$", out, re.MULTILINE)
    again = run("generate", tmp_path / "prefix", "what is 0", "what is 1", "what is 2")
    assert again.splitlines() == sentences
    scored = run(
        "generate", tmp_path / "prefix", "--input", pairs, "--score", "--output", tmp_path / "out/answers.jsonl"
    )
    assert re.search(r"^BLEU on 8 inputs: \d+\.\d$", scored, re.MULTILINE)
    answers = tmp_path / "out/answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["source"] for row in rows] == [f"what is {n}" for n in range(8)]
    assert [row["target"] for row in rows[:3]] == sentences


def test_a_missing_package_is_named_before_the_work(text, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    pairs = text / "pairs.jsonl"
    for arguments in (
        ["generate", text / "no-prefix", "--input", pairs, "--score"],
        ["train", text / "no-model", "--train", pairs, "--test", pairs, "--output", tmp_path],
    ):
        assert refused(*arguments) == "BLEU is counted by sacrebleu, which is missing: pip install 'prefixkit[text]'"


# errors


def test_errors_are_one_message(text, tmp_path, refused):
    out, pairs = tmp_path / "out", text / "pairs.jsonl"
    train = ["train", text / "gpt2", "--output", out, "--train"]
    (tmp_path / "bad.jsonl").write_text('{"source": "a", "traget": "b"}\n')
    (tmp_path / "worse.jsonl").write_text("{\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "gz.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "file").write_text("x")
    saved_prefix(nameless := tmp_path / "nameless", tiny.make("gpt2"))
    for arguments, message in [
        (["trian"], r"argument command: invalid choice: 'trian' .*; `prefixkit --help` shows what is possible"),
        ([], r"the following arguments are required: command; .*"),
        (
            ["inspect", text / "gpt2", "-P", "x"],
            r"argument -P.*: 'x' is not a whole number of 1 or more; .*",
        ),
        (
            ["inspect", text / "gpt2", "-P", 0],
            r"argument -P.*: '0' is not a whole number of 1 or more; .*",
        ),
        (["inspect", text / "gpt2", "--method", "p-tuning"], r"no method 'p-tuning' \(did you mean .*"),
        (["inspect", text / "gpt2", "--positions", "shfit"], r"positions is 'shfit' \(did you mean 'shift'\?\).*"),
        (["inspect", text / "gpt2", "--task", "causal-ml"], r"--task is 'causal-ml' \(did you mean 'causal-lm'\?\).*"),
        (["inspect", text / "gpt2", "--task", "seq2seq-lm"], r"a model of type 'gpt2' cannot be made as .*"),
        (["inspect", tmp_path / "none"], "cannot load a model from '.*none': .*"),
        (
            ["inspect", "user/none"],
            "'user/none' is neither a model nor a prefix: there is no folder .*",
        ),
        ([*train, tmp_path / "none.jsonl"], "cannot read '.*none.jsonl': .*No such file.*"),
        (
            [*train, tmp_path / "bad.jsonl"],
            r"object 1 of '.*' has no text in a field 'target' \(did you.*",
        ),
        ([*train, tmp_path / "worse.jsonl"], "line 1 of '.*worse.jsonl' is not valid JSON: .*"),
        ([*train, tmp_path / "list.jsonl"], r"line 1 of '.*list.jsonl' is not a JSON object: '\[1\]'"),
        ([*train, tmp_path / "empty.jsonl"], "'.*empty.jsonl' has no lines; each has to be a JSON object"),
        ([*train, tmp_path / "gz.jsonl.gz"], "cannot read '.*gz.jsonl.gz': .*; it has to be a file of JSON lines"),
        ([*train[:3], tmp_path / "file", "--train", pairs], "--output is '.*file', which is a file; name a folder"),
        (["generate", tmp_path / "none", "x"], "there is nothing at '.*none', and that is no name on the hub .*"),
        (["generate", tmp_path], "pass either texts or --input with a file of JSON lines"),
        (["generate", tmp_path, "x", "--score"], "--score needs --input, a file that has references"),
        (["export", tmp_path / "none", out, "--to", "kv"], "there is nothing at '.*none', and that is no name .*"),
        (["export", tmp_path, out, "--to", "kv"], "no prefix.safetensors in '.*'; nor anything of another library .*"),
        (["export", nameless, out, "--to", "kv"], "the prefix in '.*' does not say what its base is; pass --base"),
    ]:
        assert re.fullmatch(message, refused(*arguments)), arguments
    assert not out.exists()


def test_debug_shows_where(text):
    for arguments in (["--debug", "inspect", str(text / "none")], ["inspect", str(text / "none"), "--debug"]):
        with pytest.raises(prefixkit.PrefixkitError, match="^cannot load a model from"):
            cli.main(arguments)


def test_a_plugin_that_is_broken_is_an_error(tmp_path, refused, monkeypatch):
    saved_model(tmp_path)

    def broken(*_):
        raise prefixkit.UnknownAdapterError("the plugin for model type 'gpt2' failed to load: x")

    monkeypatch.setattr(discovery.Registry, "adapter_for", broken)
    assert refused("inspect", tmp_path) == "the plugin for model type 'gpt2' failed to load: x"


assert os.environ["HF_HUB_OFFLINE"] == "1", "no test of this file may ask a hub"


# Found by attack


def llama_classifier(folder):
    torch.manual_seed(0)
    config = LlamaConfig(**tiny.llama_sizes(), num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return LlamaForSequenceClassification.from_pretrained(folder)


def test_converted_to_peft_a_head_that_did_not_train_is_the_bases(tmp_path, run):
    """PEFT's file holds the head in any case; from a config alone it would be random numbers."""
    model = prefixkit.apply(llama_classifier(tmp_path / "base"), num_virtual_tokens=3, head=False)
    prefixkit.save(model, tmp_path / "own")
    run("convert", tmp_path / "own", tmp_path / "peft", "--to", "peft")
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert torch.equal(written["base_model.score.weight"], model.score.weight)


def test_a_head_that_nobody_has_is_not_made_up(tmp_path, refused):
    tiny.make("gpt2").save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    prefixkit.save(prefixkit.apply(model, num_virtual_tokens=3), tmp_path / "own")
    message = refused(
        "convert", tmp_path / "own", tmp_path / "peft", "--to", "peft", "--task", "sequence-classification"
    )
    assert "have no score.weight, which PEFT's file needs" in message
    assert not (tmp_path / "peft").exists()


def test_code_that_comes_with_a_model_is_never_run(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own-kind", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')")
    assert "code of its own, which prefixkit never runs" in refused("inspect", folder)
    assert not (tmp_path / "ran").exists()


def test_code_for_a_task_of_a_known_model_is_never_run(tmp_path, refused, monkeypatch):
    """transformers would ask on the terminal, where its own classes have no such task."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    saved_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForMaskedLM": "evil.M"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nclass M: pass\n")
    message = refused("inspect", folder, "--task", "masked-lm")
    assert "code of the model's own, which prefixkit never runs; pass another --task" in message
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def peft_folder(tmp_path):
    """A prefix in PEFT's files, with its base beside it."""
    saved_model(tmp_path / "base")
    model = prefixkit.apply(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), num_virtual_tokens=3)
    prefixkit.save(model, tmp_path / "peft", format="peft")
    return tmp_path / "peft"


def test_a_checkpoint_is_its_folder_and_not_a_file_in_it(peft_folder, tmp_path, refused):
    """Beside the file may stand another checkpoint, which would be loaded for it."""
    saved_prefix(tmp_path / "own", tiny.make("gpt2"))
    own = [tmp_path / "own/prefix_config.json", tmp_path / "own/prefix.safetensors"]
    for file in (*own, peft_folder / "adapter_model.safetensors", peft_folder / "adapter_config.json"):
        says = f"{str(file)!r} is one file of a checkpoint; pass the folder that it stands in, {str(file.parent)!r}"
        for command in (["inspect", file], ["generate", file, "x"], ["convert", file, tmp_path / "to", "--to", "peft"]):
            assert refused(*command) == says
        with pytest.raises(prefixkit.CheckpointError, match=f"^{re.escape(says)}$"):
            prefixkit.load(tiny.make("gpt2"), file)


def test_named_adapters_of_peft_stand_in_sub_folders(peft_folder, tmp_path, refused):
    """PEFT saves an adapter that is not called "default" in a folder of its name."""
    for name in ("one", "two"):
        shutil.copytree(peft_folder, tmp_path / "named" / name)
    (tmp_path / "named/logs").mkdir()
    says = "its sub-folders hold checkpoints ('one', 'two'): pass the path of one"
    named = tmp_path / "named"
    for command in (["inspect", named], ["generate", named, "x"], ["export", named, tmp_path / "to", "--to", "kv"]):
        assert refused(*command).endswith(says)
    for number in range(4):
        shutil.copytree(peft_folder, tmp_path / "named" / f"a{number}")
    with pytest.raises(prefixkit.CheckpointError, match=r"\('a0', 'a1', 'a2' and 3 more\): pass the path of one$"):
        prefixkit.load(tiny.make("gpt2"), named)


def test_inspect_knows_a_prefix_of_another_library(peft_folder, tmp_path, refused):
    torch.save({"trainable_keys": []}, tmp_path / "my cartridge.pt")
    for place in (peft_folder, tmp_path / "my cartridge.pt"):
        says = f"`prefixkit convert {shlex.quote(str(place))} DST --to prefixkit` makes one of it that can be shown"
        assert refused("inspect", place).endswith(says)


def test_a_renamed_file_of_prefixkit_is_known(tmp_path, refused):
    saved_prefix(tmp_path / "own", tiny.make("gpt2"))
    saved_model(tmp_path / "base")
    (tmp_path / "own/prefix.safetensors").rename(tmp_path / "mine.safetensors")
    message = refused(
        "convert", tmp_path / "mine.safetensors", tmp_path / "to", "--to", "peft", "--base", tmp_path / "base"
    )
    assert message.endswith(
        "prefixkit wrote mine.safetensors, and reads the folder of a checkpoint, with prefix.safetensors"
    )


def test_a_revision_is_of_the_hub(tmp_path, refused):
    saved_prefix(tmp_path / "own", tiny.make("gpt2"))
    saved_model(tmp_path / "base")
    own = tmp_path / "own"
    for command in (["inspect", own], ["generate", own, "x"], ["convert", own, tmp_path / "to", "--to", "peft"]):
        says = f"--revision is of a repository on the hub, and {str(own)!r} is here; leave it out"
        assert refused(*command, "--revision", "v2") == says
    assert refused("inspect", tmp_path / "base", "--revision", "v2").startswith("--revision is of a repository")


def test_damaged_json_of_another_library_is_one_message(tmp_path, refused):
    """Lists too deep for Python's parser end in an error of another kind."""
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    for command in (["generate", tmp_path, "x"], ["convert", tmp_path, tmp_path / "to", "--to", "peft"]):
        assert refused(*command).endswith("does not say what its base is; pass --base")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--max-train", "-1"],
        ["--max-test", "0"],
        ["--epochs", "0"],
        ["--epochs", "nan"],
        ["--learning-rate", "0"],
        ["--learning-rate", "-1"],
        ["--seed", "-1"],
        ["-P", "0"],
    ],
)
def test_numbers_that_make_no_sense(arguments, refused):
    message = refused("train", "nowhere", "--train", "pairs.jsonl", "--output", "out", *arguments)
    assert f"{arguments[0]}" in message or arguments[0] == "-P"
    assert arguments[1] in message


def test_convert_does_not_write_over_its_source(tmp_path, refused):
    prefixkit.save(prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=3), tmp_path / "own")
    before = (tmp_path / "own" / "prefix.safetensors").read_bytes()
    target = tmp_path / "own" / "prefix.safetensors"
    message = refused("export", tmp_path / "own", target, "--to", "kv", "--overwrite", "--base", TOKENIZER)
    assert "is where the prefix comes from" in message
    assert target.read_bytes() == before


def test_json_lines_may_hold_other_line_ends(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('\ufeff{"source": "a\u2028b"}\r\n{"source": "c\u0085d"}\n'.encode())
    assert text_to_text.texts(path, "source") == ["a\u2028b", "c\u0085d"]
    path.write_text("[" * 100_000)
    with pytest.raises(prefixkit.PrefixkitError, match="line 1 of .* is not valid JSON"):
        text_to_text.rows(path)


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "link", "link/out"])
def test_where_nothing_can_be_written_is_found_before_the_work(place, text, tmp_path, refused):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file/gone")
    out, nowhere = tmp_path / place, text / "no-model"
    for command, name in [
        (["train", nowhere, "--train", text / "pairs.jsonl", "--output", out, "--overwrite"], "--output"),
        (["generate", nowhere, "x", "--output", out, "--overwrite"], "--output"),
        (["convert", nowhere, out, "--to", "peft", "--overwrite"], "DST"),
        (["export", nowhere, out, "--to", "kv", "--overwrite"], "DST"),
    ]:
        first = str(tmp_path / place.split("/")[0])
        why = "a link that leads nowhere" if place == "link" else f"and {first!r} is no folder"
        assert refused(*command) == f"{name} is {str(out)!r}, {why}; name another place"


def test_where_nobody_may_write(text, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("prefixkit.cli.output.os.access", lambda folder, _: folder != tmp_path)
    message = refused("generate", text / "no-prefix", "x", "--output", tmp_path / "a/b.jsonl")
    assert message.endswith(f"and {str(tmp_path)!r} may not be written to; name another place")


def test_a_folder_is_no_file_and_a_file_no_folder(text, tmp_path, refused):
    (tmp_path / "file").write_text("x")
    nowhere = text / "no-prefix"
    for command, says in [
        (["generate", nowhere, "x", "--output", tmp_path], f"--output is {str(tmp_path)!r}, which is a folder; .*"),
        (["export", nowhere, tmp_path, "--to", "kv"], f"DST is {str(tmp_path)!r}, which is a folder; name a file"),
        (["convert", nowhere, tmp_path / "file", "--to", "peft"], "DST is '.*', which is a file; name a folder"),
        (["export", nowhere, os.devnull, "--to", "kv"], "DST is '.*', which is no plain file; name another place"),
    ]:
        assert re.fullmatch(says, refused(*command, "--overwrite"))


def test_what_is_there_stays_unless_asked(text, tmp_path, run, refused):
    prefix, pairs, answers = tmp_path / "prefix", text / "pairs.jsonl", tmp_path / "answers.jsonl"
    saved_prefix(prefix, GPT2LMHeadModel.from_pretrained(text / "gpt2"))
    answers.write_text("mine")
    for command, place in [
        (["train", text / "gpt2", "--train", pairs, "--epochs", 1, "--output", prefix], prefix),
        (["generate", prefix, "what is 1", "--max-new-tokens", 2, "--output", answers], answers),
    ]:
        file = place if place.is_file() else place / "prefix.safetensors"
        before = file.read_bytes()
        assert refused(*command) == f"{str(place)!r} is there already; name another place, or pass --overwrite"
        assert file.read_bytes() == before
        run(*command, "--overwrite")
        assert file.read_bytes() != before
    assert json.loads(answers.read_text())["source"] == "what is 1"
    run("generate", prefix, "what is 1", "--max-new-tokens", 2, "--output", os.devnull)  # which nobody replaces


def test_nothing_is_written_over_what_is_read(text, tmp_path, refused, monkeypatch):
    saved_prefix(tmp_path / "prefix", GPT2LMHeadModel.from_pretrained(text / "gpt2"))
    shutil.copy(text / "pairs.jsonl", tmp_path / "pairs.jsonl")
    shutil.copytree(text / "gpt2", tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "prefix")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command, place, what in [
        (["generate", "prefix", "--input", "pairs.jsonl", "--output", "./pairs.jsonl"], "pairs.jsonl", "--input"),
        (["generate", "prefix", "x", "--output", "link/prefix.safetensors"], "link/prefix.safetensors", "the prefix"),
        (["train", "model", "--train", "pairs.jsonl", "--output", tmp_path / "model"], tmp_path / "model", "the model"),
    ]:
        says = f"{str(place)!r} is where {what} comes from; name another place"
        assert refused(*command, "--overwrite") == says
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("spelling", ["peft", "peft/", "./peft", "base/../peft", "link", "{whole}"])
def test_convert_leaves_its_source_alone(spelling, peft_folder, refused, monkeypatch):
    """With both checkpoints in one folder, whoever loads it gets the new one, also where the old one is meant."""
    monkeypatch.chdir(peft_folder.parent)
    (peft_folder.parent / "link").symlink_to(peft_folder)
    target = spelling.format(whole=peft_folder)
    message = refused("convert", "peft", target, "--to", "prefixkit", "--overwrite")
    assert message == f"{str(Path(target))!r} is where the prefix comes from; name another place"
    assert sorted(path.name for path in peft_folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_convert_leaves_a_source_alone_that_is_one_file(tmp_path, refused):
    torch.save({"trainable_keys": []}, tmp_path / "cartridge.pt")
    message = refused(*["export", *[tmp_path / "cartridge.pt"] * 2, "--to", "kv", "--overwrite"])
    assert message.endswith("is where the prefix comes from; name another place")


def test_no_prefix_is_written_beside_another_librarys(peft_folder, text, tmp_path, refused):
    saved_prefix(tmp_path / "own", tiny.make("gpt2"))
    for command, name in [
        (["convert", tmp_path / "own", peft_folder, "--to", "prefixkit"], "DST"),
        (["train", text / "gpt2", "--train", text / "pairs.jsonl", "--output", peft_folder], "--output"),
    ]:
        assert refused(*command, "--overwrite") == (
            f"{name} is {str(peft_folder)!r}, which holds an adapter of another library (adapter_config.json); "
            "name another folder"
        )


@pytest.mark.parametrize(
    "given", [["--task", "body"], ["-P", 20], ["--num-labels", 2], ["--positions", "shift"], ["--stacks", "decoder"]]
)
def test_inspect_drops_no_option(given, tmp_path, refused):
    """A saved prefix has its own, also where the option says what is the default for a model."""
    saved_prefix(tmp_path, tiny.make("gpt2"))
    assert refused("inspect", tmp_path, *given) == (
        f"{given[0]} is of a model, and {str(tmp_path)!r} is a saved prefix; leave it out, or name a model"
    )


def classifier_prefix(folder, labels=5):
    """A prefix with a head, as prefixkit and as PEFT write it, with the body alone and a smaller head for bases."""
    torch.manual_seed(0)
    for name, kind, size in (("body", BertModel, 2), ("base", BertForSequenceClassification, 2)):
        kind(BertConfig(**tiny.BERT, num_labels=size)).save_pretrained(folder / name)
    model = BertForSequenceClassification(BertConfig(**tiny.BERT, num_labels=labels))
    prefixkit.apply(model, num_virtual_tokens=3)
    prefixkit.save(model, folder / "own")
    prefixkit.save(model, folder / "peft", format="peft")


def test_an_error_about_a_head_says_what_to_pass(tmp_path, run, refused):
    classifier_prefix(tmp_path)
    hint = "; pass the --task that the prefix was trained for, and with a classifier its --num-labels"
    for source, more in [
        ("own", ["--base", tmp_path / "body"]),
        ("own", ["--base", tmp_path / "base"]),
        ("peft", ["--base", tmp_path / "base"]),
        ("peft", ["--base", tmp_path / "body", "--task", "body"]),
    ]:
        message = refused("convert", tmp_path / source, tmp_path / "to", "--to", "prefixkit", *more)
        assert "classifier" in message
        assert message.endswith(hint)
    whole = ["--task", "sequence-classification", "--num-labels", 5, "--base", tmp_path / "body"]
    run("convert", tmp_path / "own", tmp_path / "to", "--to", "prefixkit", *whole)


def test_generate_says_that_a_head_is_of_another_task(text, tmp_path, refused):
    config = GPT2Config.from_pretrained(text / "gpt2", num_labels=3, pad_token_id=0)
    model = prefixkit.apply(GPT2ForSequenceClassification(config), num_virtual_tokens=3)
    prefixkit.save(model, tmp_path / "prefix")
    message = refused("generate", tmp_path / "prefix", "x", "--base", text / "gpt2")
    assert "head names 'score'" in message
    assert message.endswith("; generate serves language models, and this prefix was trained for another task")


def test_what_nobody_has_foreseen_is_one_message_too(text, tmp_path, refused):
    """Of torch: token ids past the embeddings, and a prefix that no memory holds."""
    saved_model(tmp_path)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path)
    train = ["train", tmp_path, "--train", text / "pairs.jsonl", "--output", tmp_path / "to"]
    assert refused("inspect", tmp_path, "-P", 10**12).startswith("RuntimeError: ")
    with pytest.raises(IndexError):
        cli.main([*map(str, train), "--debug"])
    assert cli.main([*map(str, train)]) == 1
    assert not (tmp_path / "to").exists()


def test_damaged_weights_are_one_message(text, tmp_path, refused):
    shutil.copytree(text / "gpt2", tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"x" * 100)
    message = refused("train", tmp_path / "model", "--train", text / "pairs.jsonl", "--output", tmp_path / "to")
    assert message.startswith(f"cannot load a model from {str(tmp_path / 'model')!r}: ")


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_a_base_without_a_tokenizer_is_refused(name, text, tmp_path, refused):
    """From a config alone transformers makes up a tokenizer without words, and every text would be empty."""
    saved_model(tmp_path / name)
    message = refused("train", tmp_path / name, "--train", text / "pairs.jsonl", "--output", tmp_path / "to")
    # Some versions of transformers make none up.
    own = f"{str(tmp_path / name)!r} has no tokenizer; write the base's own there, with tokenizer.save_pretrained"
    assert message == own or message.startswith("cannot load a model from ")


def test_a_tokenizer_that_ends_no_text_is_refused(text, tmp_path, refused):
    shutil.copytree(text / "gpt2", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    message = refused("train", tmp_path / "model", "--train", text / "pairs.jsonl", "--output", tmp_path / "to")
    assert message.endswith("has no eos_token, with which a text ends; give it one and save it there")


def test_an_encoder_writes_no_text(text, tmp_path, refused):
    """As a language model it would see the words that it is to write, and learn nothing."""
    BertForMaskedLM(BertConfig(**tiny.BERT)).save_pretrained(tmp_path)
    message = refused("train", tmp_path, "--train", text / "pairs.jsonl", "--output", tmp_path / "to")
    assert message == (
        f"{str(tmp_path)!r} is an encoder (bert), which writes no text; name a decoder or an encoder-decoder"
    )


def test_a_prefix_that_is_no_number_is_not_saved(text, tmp_path, capsys, monkeypatch):
    def diverge(model, *_):
        with torch.no_grad():
            next(model.prefixkit.parameters()).fill_(float("nan"))

    monkeypatch.setattr("prefixkit.cli.train.train", diverge)
    arguments = ["train", text / "gpt2", "--train", text / "pairs.jsonl", "--output", tmp_path / "to"]
    assert cli.main([str(argument) for argument in arguments]) == 1
    assert "numbers that are not finite, so the prefix is not saved" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_an_unknown_method_is_found_before_the_work(text, tmp_path, refused):
    nowhere = ["train", text / "no-model", "--train", text / "pairs.jsonl", "--output", tmp_path / "to"]
    assert refused(*nowhere, "--method", "p-tuning").startswith("no method 'p-tuning' (did you mean ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", ""],
        ["generate", "", "x"],
        ["generate", "p", "x", "--output", ""],
        ["export", "p", "", "--to", "kv"],
    ],
)
def test_an_empty_place_is_not_the_folder_one_is_in(arguments, refused):
    """It is what a variable of the shell gives that was never set."""
    assert "is empty; name a place" in refused(*arguments)


def test_what_the_terminal_cannot_show_is_printed_as_its_code(monkeypatch):
    info = prefixkit.PluginInfo(module="mod", entry_points=("mine",), distribution="\u4e2d", version="3", error="x")
    monkeypatch.setattr("prefixkit.cli.plugins.plugins", lambda: [info])
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["prefixkit", "plugins"])
    assert cli.main() == 0
    out.flush()
    assert b"\\u4e2d" in out.buffer.getvalue()


@pytest.mark.parametrize("name", ["with a space", "ünïcødé", "-"])
def test_folders_of_any_name(name, text, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_prefix(Path(name), GPT2LMHeadModel.from_pretrained(text / "gpt2"))
    assert facts(run("inspect", name))["virtual tokens"] == "4"
    assert (
        run("generate", name, "what is 1", "--max-new-tokens", 2, "--output", f"of {name}.jsonl")
        == f"wrote 1 lines to of {name}.jsonl\n"
    )
    run("convert", name, f"{name} of PEFT", "--to", "peft")
