"""Save, load, fold: round trips, resume, and errors that leave everything as it was."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given, strategies as st
from transformers import GPT2ForSequenceClassification

import prefixkit
from prefixkit import CheckpointError, checkpoint_files

TOKENS = 4
METHODS = ("p-tuning-v2", "prefix-tuning")


def tuned(architecture="gpt2", method="p-tuning-v2", **options):
    """A model with a prefix that is not what ``apply`` would draw again."""
    model = tiny.make(architecture)
    prefixkit.apply(model, method=method, num_virtual_tokens=TOKENS, **options)
    with torch.no_grad():
        for value in model.prefixkit.parameters():
            value.normal_(generator=torch.Generator().manual_seed(value.numel()))
    return model


def state(model):
    """Everything that a failed ``apply`` or ``load`` must leave alone."""
    return (
        sorted(model.__dict__),
        {name: value.requires_grad for name, value in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        model.config.to_dict(),
    )


def assert_same(before, after):
    assert before[:2] == after[:2]
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    assert before[3:] == after[3:]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", tiny.EVERY)
def test_round_trip(name, method, tmp_path):
    model = tuned(name, method, prefix_dropout=0.1)
    inputs = tiny.inputs(model)
    prefixkit.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prefix.safetensors", "prefix_config.json"]
    fresh = tiny.make(name)
    assert prefixkit.load(fresh, tmp_path) is fresh
    assert torch.equal(tiny.logits(fresh, **inputs), tiny.logits(model, **inputs))
    assert prefixkit.config(fresh) == prefixkit.config(model)
    assert not any(value.requires_grad for value in fresh.parameters())
    prefixkit.remove(fresh)
    prefixkit.load(fresh, tmp_path, trainable=True)
    trainable = {name for name, value in fresh.named_parameters() if value.requires_grad}
    assert trainable == {name for name, value in model.named_parameters() if value.requires_grad}


def test_policies_are_stored(tmp_path):
    options = {"positions": "none", "window": "slide", "layers": [0, 2], "name": "mine", "engine": "attention"}
    model = tuned("llama", **options)
    prefixkit.save(model, tmp_path)
    fresh = prefixkit.load(tiny.make("llama"), tmp_path)
    config = prefixkit.config(fresh)
    assert (config.positions, config.window, config.layers, config.name) == ("none", "slide", (0, 2), "mine")
    assert torch.equal(tiny.logits(fresh, **tiny.inputs(fresh)), tiny.logits(model, **tiny.inputs(model)))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_fold_is_exact_and_is_what_is_saved(name, tmp_path):
    model = tuned(name, "prefix-tuning")
    inputs = tiny.inputs(model)
    expected = tiny.logits(model, **inputs)
    assert prefixkit.fold(model) is model
    assert torch.equal(tiny.logits(model, **inputs), expected)
    assert [tuple(value.shape) for value in model.prefixkit.parameters()] == [
        (TOKENS, sum(site.width for site in prefixkit.sites(model)))
    ]
    assert all(value.requires_grad for value in model.prefixkit.parameters())
    prefixkit.save(prefixkit.fold(model), tmp_path)
    fresh = prefixkit.load(tiny.make(name), tmp_path)
    assert prefixkit.config(fresh).folded
    assert torch.equal(tiny.logits(fresh, **inputs), expected)


def test_head_is_saved_with_the_prefix(tmp_path):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny.gpt2()).eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with torch.no_grad():
        model.score.weight.add_(1.0)
    prefixkit.save(model, tmp_path)
    fresh = GPT2ForSequenceClassification(tiny.gpt2()).eval()
    fresh.load_state_dict(base)
    prefixkit.load(fresh, tmp_path)
    ids = tiny.tokens(2, 5)
    assert torch.equal(tiny.logits(fresh, input_ids=ids), tiny.logits(model, input_ids=ids))
    with prefixkit.disabled(fresh):
        assert torch.equal(fresh.score.weight, base["score.weight"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_files_are_the_prefix_and_little_else(tmp_path, name):
    model = tuned(name)
    prefixkit.save(model, tmp_path)
    numbers = sum(site.width for site in prefixkit.sites(model)) * TOKENS
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"prefix.safetensors", "prefix_config.json"}
    assert 4 * numbers < sizes["prefix.safetensors"] < 4 * numbers + 2000
    assert sizes["prefix_config.json"] < 2000


def test_a_body_takes_the_prefix_of_a_language_model(tmp_path):
    model = tuned()
    prefixkit.save(model, tmp_path)
    body = tiny.make("gpt2").transformer
    prefixkit.load(body, tmp_path)
    ids = tiny.tokens(2, 5)
    with torch.no_grad():
        expected = model.transformer(ids).last_hidden_state
        assert torch.equal(body(ids).last_hidden_state, expected)


def test_a_crash_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch):
    """Break every step of a second save in turn; what is there always loads as one of the two."""
    old, new = tuned(), tuned(positions="none")
    with torch.no_grad():
        new.prefixkit.default.embedding.weight.add_(1.0)
    inputs = tiny.inputs(old)
    possible = [tiny.logits(old, **inputs), tiny.logits(new, **inputs)]
    seen = set()
    for step in range(12):
        prefixkit.save(old, tmp_path)
        count = 0

        def broken(name, original, step=step):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > step:
                    raise KeyboardInterrupt(name)
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in [
                (checkpoint_files.tempfile, "mkstemp"),
                (checkpoint_files.os, "fsync"),
                (checkpoint_files.Path, "chmod"),
                (checkpoint_files.Path, "replace"),
            ]:
                patch.setattr(owner, name, broken(name, getattr(owner, name)))
            try:
                prefixkit.save(new, tmp_path)
            except KeyboardInterrupt:
                pass
        found = tiny.logits(prefixkit.load(tiny.make("gpt2"), tmp_path), **inputs)
        matches = [index for index, wanted in enumerate(possible) if torch.equal(found, wanted)]
        assert matches, f"step {step} left a mixture"
        seen.update(matches)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["prefix.safetensors", "prefix_config.json"]
    assert seen == {0, 1}


def test_numbers_alone_are_a_whole_checkpoint(tmp_path):
    model = tuned()
    prefixkit.save(model, tmp_path)
    (tmp_path / "prefix_config.json").unlink()
    fresh = prefixkit.load(tiny.make("gpt2"), tmp_path)
    assert torch.equal(tiny.logits(fresh, **tiny.inputs(fresh)), tiny.logits(model, **tiny.inputs(model)))


def write_changed(folder, changes):
    """A checkpoint whose configuration has other values in some fields."""
    source = tuned()
    config = {"format": 1, **prefixkit.config(source).to_dict(), **changes}
    weights = source.prefixkit.default.state_dict()
    metadata = {"prefixkit": json.dumps(config)}
    safetensors.torch.save_file(weights, folder / "prefix.safetensors", metadata=metadata)


def loads(folder):
    """Whether a bare model takes the checkpoint; one that does not is as it was."""
    model = tiny.make("gpt2")
    before = state(model)
    try:
        prefixkit.load(model, folder)
    except prefixkit.PrefixkitError:
        assert_same(before, state(model))
        return False
    return True


def refused(tmp_path, message, name="gpt2"):
    model = tiny.make(name)
    before = state(model)
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        prefixkit.load(model, tmp_path)
    assert_same(before, state(model))


def test_missing_and_foreign_folders(tmp_path):
    where = re.escape(repr(str(tmp_path)))
    refused(tmp_path / "none", r"no prefix.safetensors in '.*none': it is no folder")
    nothing = f"no prefix.safetensors in {where}; nor anything of another library that prefixkit reads"
    refused(tmp_path, nothing)
    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, nothing)
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "prefix.safetensors")
    refused(tmp_path, r".*prefix.safetensors was not written by prefixkit: its header has no 'prefixkit' entry")


def test_other_architecture_is_refused_even_if_its_shapes_fit(tmp_path):
    prefixkit.save(tuned("llama"), tmp_path)
    where = re.escape(repr(str(tmp_path)))
    refused(
        tmp_path,
        f"the prefix in {where} is for model type 'llama'; this MistralForCausalLM is 'mistral'",
        "mistral",
    )


def test_other_sizes_are_refused(tmp_path):
    prefixkit.save(tuned(), tmp_path)
    for changes, message in [
        ({"n_layer": 2}, "the prefix in .* has 3 sites; this model has 2"),
        ({"n_head": 2}, "the prefix in .* was trained for Site.*; this model has Site.*"),
    ]:
        model = tiny.make("gpt2", **changes)
        before = state(model)
        with pytest.raises(CheckpointError, match=f"^{message}$"):
            prefixkit.load(model, tmp_path)
        assert_same(before, state(model))


def test_head_that_the_model_lacks(tmp_path):
    model = GPT2ForSequenceClassification(tiny.gpt2())
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    prefixkit.save(model, tmp_path)
    refused(
        tmp_path,
        "the prefix in .* does not fit this GPT2LMHeadModel: head names 'score', which GPT2LMHeadModel does not have.*",
    )


def test_newer_format(tmp_path):
    write_changed(tmp_path, {"format": 2})
    refused(tmp_path, r".*prefix.safetensors has format 2; this prefixkit reads 1. Install a newer prefixkit")


def test_wrong_tensors(tmp_path):
    model = tuned()
    config = prefixkit.config(model)
    weight = model.prefixkit.default.embedding.weight.detach()
    for tensors, message in [
        ({}, "tensor 'embedding.weight' in .* is missing; this model needs .*"),
        (
            {"embedding.weight": weight[:2]},
            r"tensor 'embedding.weight' in .* is \(2, 192\); this model needs \(4, 192\)",
        ),
        (
            {"embedding.weight": weight, "more": torch.zeros(2)},
            r"tensor 'more' in .* is \(2,\); this model needs no such tensor",
        ),
    ]:
        checkpoint_files.write(tmp_path, config, tensors)
        refused(tmp_path, message)


def test_saving_to_a_file(tmp_path):
    target = tmp_path / "taken"
    target.write_text("mine")
    message = f"^cannot save to {re.escape(repr(str(target)))}: it is a file; name a folder$"
    with pytest.raises(CheckpointError, match=message):
        prefixkit.save(tuned(), target)
    assert target.read_text() == "mine"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    prefixkit.save(tuned(method="prefix-tuning"), folder)
    return (folder / "prefix.safetensors").read_bytes()


@given(st.data())
def test_any_truncation_or_flip_is_a_clear_error_or_the_same_shapes(saved, tmp_path_factory, data):
    """A damaged file never half-loads: it raises and leaves the model alone, or loads whole."""
    content = bytearray(saved)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        whole = False
    else:
        place = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        whole = True
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "prefix.safetensors").write_bytes(content)
    loaded = loads(folder)
    assert whole or not loaded, "a truncated file was loaded"


@given(
    st.dictionaries(
        st.sampled_from(sorted(prefixkit.PrefixConfig.__dataclass_fields__)),
        st.one_of(st.none(), st.integers(-3, 3), st.text(max_size=3), st.lists(st.integers(), max_size=2)),
        min_size=1,
        max_size=2,
    )
)
def test_any_wrong_field_is_a_clear_error(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("changed")
    write_changed(folder, changes)
    loads(folder)


@pytest.mark.parametrize("changes", [{"method_options": {"prefix_projektion": False}}, {"num_virtual_tokens": 10**14}])
def test_options_and_sizes_that_no_model_has(changes, tmp_path):
    write_changed(tmp_path, changes)
    refused(tmp_path, "the prefix in .* does not fit this GPT2LMHeadModel: (?s:.*)")


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_is_tied_in_one_model_and_not_in_the_other(trained, tmp_path):
    """The embeddings would stay the base's, or change with the head: other numbers, without a word."""

    def model(tied):
        return tiny.MAKERS["gpt2"](tie_word_embeddings=tied)

    saved = prefixkit.apply(model(trained), num_virtual_tokens=2, head=["lm_head"])
    prefixkit.save(saved, tmp_path)
    other = model(not trained)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"^the head lm_head of the prefix in .* was tied with .* when it trained, and is tied with .* in this "
        r"model; make the model with the same tie_word_embeddings$",
    ):
        prefixkit.load(other, tmp_path)
    assert before.keys() == other.state_dict().keys()
    same = prefixkit.load(model(trained), tmp_path)
    assert prefixkit.config(same).head_tied == (("transformer.wte.weight",) if trained else ())
