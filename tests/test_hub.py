"""Push and load against a stand-in for the hub that huggingface_hub's own client talks to."""

from __future__ import annotations

import json
import re

import huggingface_hub
import pytest
import tiny
import torch
from hub_server import serving
from huggingface_hub import ModelCard, constants, file_download, hf_api
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import hub as transformers_hub

import prefixkit
from prefixkit import CheckpointError, cli, hub

TOKENS = 4
ID = "user/my-prefix"
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A hub that is reachable, with an empty cache of downloads; its content."""
    with serving() as (content, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Before huggingface_hub 1 the module that downloads has its own copy.
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        # The functions of the package itself belong to a client that was made with it.
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        # transformers keeps a client from the first call on, whoever made it.
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        # Before version 5 it also keeps the mode in which it was imported.
        monkeypatch.setattr(transformers_hub, "_is_offline_mode", False, raising=False)
        offline_mode(monkeypatch, False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", content.token)
        monkeypatch.chdir(tmp_path)
        yield content
        forget_sessions()


def offline_mode(monkeypatch, value):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
    forget_sessions()


def forget_sessions():
    """Before huggingface_hub 1 a session is of the mode in which it was made, and kept."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


def tuned(name="gpt2", method="p-tuning-v2", **options):
    """A model whose prefix is not what ``apply`` would draw again."""
    return tuned_on(tiny.make(name), method=method, **options)


def tuned_on(model, **options):
    return drawn(prefixkit.apply(model, num_virtual_tokens=TOKENS, **options))


def drawn(model):
    with torch.no_grad():
        for value in model.prefixkit.parameters():
            value.normal_(generator=torch.Generator().manual_seed(value.numel()))
    return model


def same(one, other):
    inputs = tiny.inputs(one)
    return torch.equal(tiny.logits(one, **inputs), tiny.logits(other, **inputs))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_push_and_load(name, online):
    model = tuned(name)
    address = prefixkit.push_to_hub(model, ID, commit_message="First one")
    files = online.files(ID)
    assert sorted(files) == ["README.md", "prefix.safetensors", "prefix_config.json"]
    assert re.fullmatch(rf"http://127.0.0.1:\d+/{ID}/commit/[0-9a-f]{{40}}", address)
    assert online.repositories[ID].messages == ["First one"]
    fresh = prefixkit.load(tiny.make(name), ID)
    assert same(fresh, model)
    assert prefixkit.config(fresh) == prefixkit.config(model)


def test_the_path_of_a_local_base_is_not_uploaded(online, tmp_path):
    tiny.make("gpt2").save_pretrained(tmp_path / "private" / "my-base")
    model = tuned_on(GPT2LMHeadModel.from_pretrained(tmp_path / "private" / "my-base"))
    prefixkit.push_to_hub(model, ID)
    files = online.files(ID)
    assert not [name for name, content in files.items() if b"private" in content]
    assert json.loads(files["prefix_config.json"])["base_model_name_or_path"] == "my-base"
    assert prefixkit.config(model).base_model_name_or_path == str(tmp_path / "private" / "my-base")


def test_an_owner_is_added_and_another_prefix_can_be_named(online):
    model = tuned(name="gpt2")
    drawn(prefixkit.apply(model, num_virtual_tokens=2, name="second"))
    prefixkit.push_to_hub(model, "mine", name="default")
    assert json.loads(online.files("user/mine")["prefix_config.json"])["name"] == "default"
    assert "# mine" in online.files("user/mine")["README.md"].decode()
    assert 'prefixkit.load(model, "user/mine")' in online.files("user/mine")["README.md"].decode()


def test_only_the_files_of_a_prefix_are_downloaded(online):
    prefixkit.push_to_hub(tuned(), ID)
    weights = {"model.safetensors": b"gigabytes", "training_args.bin": b"a pickle"}
    online.repositories[ID].branches["main"].append({**online.files(ID), **weights})
    online.downloaded.clear()
    prefixkit.load(tiny.make("gpt2"), ID)
    assert sorted(online.downloaded) == ["prefix.safetensors", "prefix_config.json"]


def test_revisions(online):
    first, second = tuned(), tuned(positions="none")
    prefixkit.push_to_hub(first, ID)
    prefixkit.push_to_hub(second, ID, revision="positions-none")
    assert same(prefixkit.load(tiny.make("gpt2"), ID), first)
    there = prefixkit.load(tiny.make("gpt2"), ID, revision="positions-none")
    assert prefixkit.config(there).positions == "none"
    assert same(there, second)
    card = online.files(ID, "positions-none")["README.md"].decode()
    assert f"prefixkit.load(model, \"{ID}\", revision='positions-none')" in card
    with pytest.raises(CheckpointError, match=f"^the repository '{ID}' has no revision 'v9'; see its branches$"):
        prefixkit.load(tiny.make("gpt2"), ID, revision="v9")


def test_private_repositories_need_the_token(online, monkeypatch):
    prefixkit.push_to_hub(tuned(), ID, private=True)
    assert online.repositories[ID].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=f"^there is no folder '{ID}' here, and http://.* shows no repository "):
        prefixkit.load(tiny.make("gpt2"), ID)
    assert same(prefixkit.load(tiny.make("gpt2"), ID, token=online.token), tuned())
    with pytest.raises(CheckpointError, match="Check the connection, the name, and the rights of your token"):
        prefixkit.push_to_hub(tuned(), ID, token="hf_wrong")


def test_a_folder_wins(online, tmp_path):
    prefixkit.push_to_hub(tuned(positions="none"), ID)
    prefixkit.save(tuned(), tmp_path / ID)
    online.requests.clear()
    assert prefixkit.config(prefixkit.load(tiny.make("gpt2"), ID)).positions == "shift"
    assert online.requests == []


@pytest.mark.parametrize("place", ["my-prefix", "./user/my-prefix", "/user/my-prefix", "a/b/c", "user/", "../x"])
def test_what_is_no_repository_is_not_asked_for(place, online):
    assert not hub.is_repo_id(place)
    with pytest.raises(CheckpointError, match=r"^no prefix.safetensors in '.*': it is no folder$"):
        prefixkit.load(tiny.make("gpt2"), place)
    assert online.requests == []


def test_missing_repositories(online):
    message = (
        r"^there is no folder 'user/none' here, and http://127.0.0.1:\d+ shows no repository 'user/none'; check the "
        r"name. If it is private or gated, pass token=, or log in with `hf auth login`$"
    )
    with pytest.raises(CheckpointError, match=message):
        prefixkit.load(tiny.make("gpt2"), "user/none")
    online.add("user/model", {"config.json": b"{}", "model.safetensors": b"gigabytes"})
    with pytest.raises(CheckpointError, match=r"^the repository 'user/model' holds no prefix.safetensors, nor a "):
        prefixkit.load(tiny.make("gpt2"), "user/model")
    assert online.downloaded == []


def test_offline(online, monkeypatch):
    model = tuned()
    prefixkit.push_to_hub(model, ID)
    prefixkit.load(tiny.make("gpt2"), ID)
    offline_mode(monkeypatch, True)
    assert same(prefixkit.load(tiny.make("gpt2"), ID), model), "it was downloaded before"
    message = (
        r"^there is no folder 'user/other' here, and the hub is not asked: offline mode is on \(HF_HUB_OFFLINE\), and "
        r"'user/other' is not among what was downloaded before; unset that and load it once, or name a folder$"
    )
    with pytest.raises(CheckpointError, match=message):
        prefixkit.load(tiny.make("gpt2"), "user/other")


def test_offline_push(online, monkeypatch):
    offline_mode(monkeypatch, True)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(CheckpointError, match=r"^the hub is not asked: offline mode is on \(HF_HUB_OFFLINE\); unset "):
        prefixkit.push_to_hub(tuned(), ID)


def offline(*_, **__):
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline")


def test_a_hub_that_is_down(online, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=f"^there is no folder '{ID}' here, and http://127.0.0.1:9 did not do "):
        prefixkit.load(tiny.make("gpt2"), ID)
    with pytest.raises(CheckpointError, match=f"^http://127.0.0.1:9 did not do what was asked for '{ID}': "):
        prefixkit.push_to_hub(tuned(), ID)


def test_the_card_says_what_it_is(online):
    model = tiny.make("mistral")
    model.config._name_or_path = "someone/base-model"
    options = {"window": "slide", "positions": "none", "layers": [0, 2]}
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=TOKENS, encoder_hidden_size=8, **options)
    prefixkit.push_to_hub(model, ID)
    text = online.files(ID)["README.md"].decode()
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.license) == ("prefixkit", "someone/base-model", None)
    assert data.tags == ["prefixkit", "prefix-tuning", "mistral"]
    numbers = sum(value.numel() for value in model.prefixkit.parameters())
    size = len(online.files(ID)["prefix.safetensors"])
    table = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert table == {
        "base model": "`someone/base-model`",
        "model type, class": "`mistral`, `MistralForCausalLM`",
        "method": "prefix-tuning",
        "virtual tokens (P)": "4",
        "prefix in": "decoder (2 layers)",
        "positions": "`none`",
        "window": "`slide`",
        "engine": "attention",
        "trained head": "none",
        "parameters": f"{numbers:,}",
        "size": f"{size / 1000:,.1f} kB",
    }


def test_the_code_of_the_card_runs(online, tmp_path):
    """For a task class with a head of its own; a base that is a folder is not told to others."""
    torch.manual_seed(0)
    made = tiny.encoder("SequenceClassification")
    made.base_model.save_pretrained(tmp_path / "secret/base")
    base = str(tmp_path / "secret/base")
    model = type(made).from_pretrained(base, num_labels=5).eval()
    drawn(prefixkit.apply(model, num_virtual_tokens=TOKENS))
    prefixkit.push_to_hub(model, ID)
    text = online.files(ID)["README.md"].decode()
    assert "secret" not in text
    assert "| trained head | `classifier` (165 parameters) |" in text
    assert ModelCard(text).data.base_model is None
    names = {}
    exec(CODE.search(text)[1].replace("path/to/base", base), names)
    assert type(names["model"]) is type(made)
    ids = tiny.tokens(2, 5)
    assert torch.equal(tiny.logits(names["model"].eval(), input_ids=ids), tiny.logits(model, input_ids=ids))


def test_a_card_that_is_not_ours_stays(online):
    online.add(ID, {"README.md": b"# My own words"})
    prefixkit.push_to_hub(tuned(), ID)
    assert online.files(ID)["README.md"] == b"# My own words"
    assert "prefix.safetensors" in online.files(ID)


def test_our_card_is_written_anew(online):
    prefixkit.push_to_hub(tuned(), ID)
    prefixkit.push_to_hub(tuned(positions="none"), ID)
    assert "| positions | `none` |" in online.files(ID)["README.md"].decode()


def test_save_writes_no_card(tmp_path):
    prefixkit.save(tuned(), tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_save_pretrained_and_the_models_own_push(online, tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, commit_message="From save_pretrained")
    assert sorted(online.files("user/saved")) == ["README.md", "prefix.safetensors", "prefix_config.json"]
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=ID)
    assert same(prefixkit.load(tiny.make("gpt2"), ID), model)
    model.push_to_hub("user/third", max_shard_size="1GB", tags=["ignored"])
    assert sorted(online.files("user/third")) == ["README.md", "prefix.safetensors", "prefix_config.json"]
    prefixkit.remove(model)
    assert "push_to_hub" not in model.__dict__


def test_a_trainer_that_pushes(online, tmp_path):
    """Its last push holds all that ``load`` needs."""
    model = tuned()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        push_to_hub=True,
        hub_model_id="user/trained",
        hub_strategy="end",
        max_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    row = {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 2)
    trainer.train()
    trainer.push_to_hub()
    assert same(prefixkit.load(tiny.make("gpt2"), "user/trained"), model.eval())


def test_the_command_line_takes_names_on_the_hub(online, tmp_path, capsys):
    model = tiny.make("gpt2")
    model.save_pretrained(tmp_path / "base")
    prefixkit.push_to_hub(prefixkit.apply(model, num_virtual_tokens=TOKENS), ID)
    assert cli.main(["inspect", ID]) == 0
    assert "virtual tokens  4" in capsys.readouterr().out
    config = (tmp_path / "base/config.json").read_bytes()
    online.add("user/base", {"config.json": config, "model.safetensors": b"gigabytes"})
    assert cli.main(["inspect", "user/base"]) == 0
    assert "model             GPT2LMHeadModel (gpt2)" in capsys.readouterr().out
    assert cli.main(["export", ID, str(tmp_path / "kv"), "--to", "kv", "--base", "user/base"]) == 0
    assert "model.safetensors" not in online.downloaded
    assert cli.main(["inspect", "user/none"]) == 1
    assert "'user/none' is neither a model nor a prefix: there is no folder" in capsys.readouterr().err
