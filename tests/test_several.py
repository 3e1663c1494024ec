"""Several prefixes on one model: names, switching, freezing, heads, and rows that have their own."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPTJConfig,
    GPTJForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)
from versions import since

import prefixkit
from prefixkit.testing.recording import uncompiled
from prefixkit.testing.subject import enable_checkpointing

T5 = pytest.param("t5", marks=since("5.15", "it is off the interface"))
BERT = pytest.param("bert", marks=since("5.0", "it is off the interface"))
LENGTHS = {"first": 4, "second": 2}


def strong(model, name):
    """The prefix ``name`` with numbers as large as a model's own keys and values."""
    with torch.no_grad():
        for value in getattr(model.prefixkit, name).parameters():
            generator = torch.Generator().manual_seed(len(name))
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def two(model, **options):
    """A model with the prefixes ``first`` and ``second``, the latter active."""
    for name, tokens in LENGTHS.items():
        strong(prefixkit.apply(model, num_virtual_tokens=tokens, name=name, init="random", **options), name)
    return model


def classifier(task="SequenceClassification"):
    torch.manual_seed(0)
    model = tiny.encoder(task).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.2)
    return model


def alone(model, name, **inputs):
    if name is None:
        with prefixkit.disabled(model):
            return tiny.logits(model, **inputs)
    return tiny.logits(prefixkit.activate(model, name), **inputs)


def trained(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


def everything(model):
    """All that a failing call must leave as it was."""
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    return hooks, values, trained(model), prefixkit.names(model), sorted(vars(model))


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    assert one[2:] == other[2:]


# One after the other


def test_names_and_the_active_one():
    model = tiny.make("gpt2")
    assert prefixkit.names(model) == []
    two(model)
    assert prefixkit.names(model) == ["first", "second"]
    assert prefixkit.config(model).name == "second"
    assert prefixkit.config(model, "first").num_virtual_tokens == 4
    assert prefixkit.activate(model, "first") is model
    assert prefixkit.config(model).name == "first"


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_each_alone_gives_what_it_gives_on_a_model_of_its_own(name):
    model, inputs = two(tiny.make(name)), tiny.inputs(tiny.make(name))
    for prefix, tokens in LENGTHS.items():
        own = prefixkit.apply(tiny.make(name), num_virtual_tokens=tokens, name=prefix, init="random")
        assert torch.equal(alone(model, prefix, **inputs), tiny.logits(strong(own, prefix), **inputs))


def test_only_the_active_one_trains_and_trains_on_when_it_is_active_again():
    model = two(tiny.make("llama"))
    assert trained(model) == {"prefixkit.second.embedding.weight"}
    prefixkit.activate(model, "first")
    assert trained(model) == {"prefixkit.first.embedding.weight"}
    model.prefixkit.first.requires_grad_(False)
    prefixkit.activate(model, "second")
    assert trained(model) == {"prefixkit.second.embedding.weight"}
    prefixkit.activate(model, "first")
    assert trained(model) == set()


def test_parameters_stay_the_same_objects():
    """An optimizer made before goes on."""
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=3, name="first")
    weight = model.prefixkit.first.embedding.weight
    prefixkit.apply(model, num_virtual_tokens=3, name="second")
    prefixkit.activate(model, "first")
    prefixkit.remove(model, "second")
    assert model.prefixkit.first.embedding.weight is weight
    assert weight.requires_grad


def test_the_second_one_starts_from_the_base_alone():
    """It reads its first keys and values from the base, not through the first prefix."""
    ids = torch.arange(3, 8)
    expected = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=5, init=prefixkit.TextInit(ids))
    model = strong(prefixkit.apply(tiny.make("llama"), num_virtual_tokens=4, name="first"), "first")
    prefixkit.apply(model, num_virtual_tokens=5, init=prefixkit.TextInit(ids))
    assert torch.equal(model.prefixkit.default.embedding.weight, expected.prefixkit.default.embedding.weight)


def test_remove_one_and_then_all():
    model = two(tiny.make("bart"))
    inputs = tiny.inputs(model)
    first = alone(model, "first", **inputs)
    with pytest.raises(prefixkit.AttachmentError, match="'first' is active; activate another one first \\('second'\\)"):
        prefixkit.remove(model, "first")
    prefixkit.remove(model, "second")
    assert prefixkit.names(model) == ["first"]
    assert torch.equal(tiny.logits(model, **inputs), first)
    base = tiny.make("bart")
    prefixkit.remove(model, "first")
    assert torch.equal(tiny.logits(model, **inputs), tiny.logits(base, **inputs))
    assert_same(everything(model), everything(base))


def test_remove_takes_all_by_default():
    model, base = two(tiny.make("gpt2")), tiny.make("gpt2")
    prefixkit.remove(model)
    assert_same(everything(model), everything(base))
    assert prefixkit.names(model) == []


def test_fold_and_unfreeze_name_the_active_one():
    model = prefixkit.apply(tiny.make("gpt2"), "prefix-tuning", num_virtual_tokens=3, name="first")
    prefixkit.apply(model, "prefix-tuning", num_virtual_tokens=3, name="second")
    inputs = tiny.inputs(model)
    before = [alone(model, name, **inputs) for name in ("first", "second")]
    prefixkit.fold(model)
    assert prefixkit.config(model).folded
    assert not prefixkit.config(model, "first").folded
    after = [alone(model, name, **inputs) for name in ("first", "second")]
    torch.testing.assert_close(before, after)


# Failures


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (
            lambda m: prefixkit.activate(m, "frist"),
            "AttachmentError",
            "no prefix 'frist' \\(did you mean 'first'\\?\\)",
        ),
        (lambda m: prefixkit.remove(m, "third"), "AttachmentError", "no prefix 'third'; it has 'first', 'second'"),
        (lambda m: prefixkit.config(m, "third"), "AttachmentError", "no prefix 'third'"),
        (lambda m: prefixkit.save(m, "x", name="third"), "AttachmentError", "no prefix 'third'"),
        (lambda m: prefixkit.apply(m, num_virtual_tokens=3, name="first"), "AttachmentError", "has a prefix 'first'"),
        (lambda m: prefixkit.apply(m, num_virtual_tokens=3, engine="cache"), "ConfigError", "have one engine"),
        (lambda m: prefixkit.apply(m, num_virtual_tokens=3, layers=[9]), "ConfigError", "layers asks for"),
        (lambda m: prefixkit.apply(m, num_virtual_tokens=3, init="nothing"), "ConfigError", "nothing"),
        (lambda m: prefixkit.load(m, "/nowhere"), "CheckpointError", "no prefix.safetensors"),
    ],
)
def test_what_fails_leaves_the_prefixes_as_they_were(action, error, message):
    model = two(tiny.make("llama"))
    prefixkit.activate(model, "first")
    inputs = tiny.inputs(model)
    before, numbers = everything(model), tiny.logits(model, **inputs)
    with pytest.raises(getattr(prefixkit, error), match=message):
        action(model)
    assert_same(before, everything(model))
    assert torch.equal(tiny.logits(model, **inputs), numbers)


@pytest.mark.parametrize("block", [prefixkit.disabled, lambda model: prefixkit.rows(model, ["first"])])
@pytest.mark.parametrize(
    "action",
    [
        lambda model: prefixkit.activate(model, "first"),
        lambda model: prefixkit.apply(model, num_virtual_tokens=3, name="third"),
        lambda model: prefixkit.remove(model),
        copy.deepcopy,
    ],
)
def test_nothing_changes_inside_a_block(block, action):
    model = two(tiny.make("gpt2"))
    with block(model), pytest.raises(prefixkit.AttachmentError, match=r"outside of prefixkit\.disabled"):
        action(model)
    assert prefixkit.names(model) == ["first", "second"]


# Files


@pytest.mark.parametrize("base", [T5, "bart"])
def test_saved_by_name_and_loaded_side_by_side(base, tmp_path):
    model = two(tiny.make(base))
    inputs = tiny.inputs(model)
    expected = {name: alone(model, name, **inputs) for name in LENGTHS}
    for name in LENGTHS:
        prefixkit.save(model, tmp_path / name, name=name)
    other = tiny.make(base)
    prefixkit.load(other, tmp_path / "first", trainable=True)
    prefixkit.load(other, tmp_path / "second")
    prefixkit.load(other, tmp_path / "first", name="again")
    assert prefixkit.names(other) == ["first", "second", "again"]
    assert trained(other) == set()
    for name, of in (("first", "first"), ("second", "second"), ("again", "first")):
        assert torch.equal(alone(other, name, **inputs), expected[of])
    prefixkit.activate(other, "first")
    assert trained(other) == {"prefixkit.first.embedding.weight"}


class Texts(Dataset):
    def __init__(self, count=8):
        self.ids = tiny.tokens(count, 6)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def test_trainer_trains_and_saves_the_active_one(tmp_path):
    model = two(tiny.make("gpt2"))
    prefixkit.activate(model, "first")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, learning_rate=0.1, report_to=[], use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=Texts()).train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"prefixkit.first.embedding.weight"}
    fresh = prefixkit.load(tiny.make("gpt2"), tmp_path / "checkpoint-2")
    inputs = tiny.inputs(model)
    assert torch.equal(tiny.logits(fresh, **inputs), tiny.logits(model, **inputs))


# Heads


def head_of_its_own(model, name, value):
    prefixkit.activate(model, name)
    with torch.no_grad():
        model.classifier.weight.fill_(value)


def test_each_prefix_has_its_head(tmp_path):
    model = classifier()
    base = model.classifier.weight.detach().clone()
    two(model)
    for name, value in (("first", 1.0), ("second", 2.0)):
        head_of_its_own(model, name, value)
    prefixkit.activate(model, "first")
    assert (model.classifier.weight == 1).all()
    assert model.classifier.weight.requires_grad
    with prefixkit.disabled(model):
        assert torch.equal(model.classifier.weight, base)
    assert (model.classifier.weight == 1).all()
    prefixkit.save(model, tmp_path, name="second")
    loaded = prefixkit.load(classifier(), tmp_path)
    assert (loaded.classifier.weight == 2).all()
    prefixkit.activate(model, "second")
    prefixkit.remove(model, "first")
    assert (model.classifier.weight == 2).all()
    prefixkit.remove(model)
    assert torch.equal(model.classifier.weight, base)


def test_a_prefix_without_a_head_has_the_bases():
    model = classifier()
    base = model.classifier.weight.detach().clone()
    prefixkit.apply(model, num_virtual_tokens=3, name="first")
    head_of_its_own(model, "first", 1.0)
    prefixkit.apply(model, num_virtual_tokens=3, name="bare", head=False)
    assert torch.equal(model.classifier.weight, base)
    assert trained(model) == {"prefixkit.bare.embedding.weight"}
    prefixkit.activate(model, "first")
    assert (model.classifier.weight == 1).all()
    assert "classifier.weight" in trained(model)


@pytest.mark.parametrize("active", ["first", "second", "bare"])
def test_rows_go_through_their_own_head(active):
    model = two(classifier())
    prefixkit.apply(model, num_virtual_tokens=3, name="bare", head=False)
    for name, value in (("first", 0.1), ("second", -0.2)):
        head_of_its_own(model, name, value)
    ids = tiny.tokens(5, 6)
    names = ["second", None, "first", "bare", "second"]
    expected = [alone(model, name, input_ids=ids[row : row + 1])[0] for row, name in enumerate(names)]
    prefixkit.activate(model, active)
    with prefixkit.rows(model, names):
        found = tiny.logits(model, input_ids=ids)
        with prefixkit.disabled(model):
            base = tiny.logits(model, input_ids=ids)
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(base[1], expected[1])


@since("5.0", "no encoder on the interface chooses among texts")
def test_rows_of_multiple_choice_are_named_for_each_choice():
    model = two(classifier("MultipleChoice"))
    ids = tiny.tokens(2, 3, 6)
    expected = [alone(model, name, input_ids=ids)[row] for row, name in enumerate(["first", "second"])]
    with prefixkit.rows(model, ["first"] * 3 + ["second"] * 3):
        torch.testing.assert_close(tiny.logits(model, input_ids=ids), torch.stack(expected))
    with (
        prefixkit.rows(model, ["first", "second"]),
        pytest.raises(prefixkit.EngineError, match="names the prefixes of 2 rows, and this call has 6"),
    ):
        model(input_ids=ids)


def test_a_head_that_is_a_bare_parameter_is_refused():
    model = classifier()
    prefixkit.apply(model, num_virtual_tokens=3, head=["classifier.weight"])
    with (
        pytest.raises(prefixkit.ConfigError, match="'classifier.weight' is a bare parameter"),
        prefixkit.rows(model, ["default"]),
    ):
        pass
    assert tiny.logits(model, input_ids=tiny.tokens(2, 3)).shape == (2, 2)


# Rows


NAMES = st.lists(st.sampled_from(["first", "second", None]), min_size=1, max_size=5).filter(any)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", T5, "bart", BERT])
@given(names=NAMES, data=st.data())
def test_any_rows_equal_the_rows_alone(name, names, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=len(names), max_size=len(names)))
    options = {"positions": data.draw(st.sampled_from(["shift", "none"]))}
    if name in ("mistral", "gemma3"):
        options["window"] = data.draw(st.sampled_from(["pinned", "slide"]))
    model = two(tiny.make(name, attention=data.draw(st.sampled_from(["eager", "sdpa"]))), **options)
    rows = [tiny.tokens(length, seed=length) for length in lengths]
    ids, mask = tiny.left_pad(rows)
    targets = {"decoder_input_ids": tiny.tokens(len(names), 3)} if model.config.is_encoder_decoder else {}
    with prefixkit.rows(model, names):
        found = tiny.logits(model, input_ids=ids, attention_mask=mask, **targets)
    for index, (row, prefix) in enumerate(zip(rows, names, strict=True)):
        own = {key: value[index : index + 1] for key, value in targets.items()}
        expected = alone(model, prefix, input_ids=row[None], attention_mask=torch.ones_like(row)[None], **own)[0]
        real = found[index] if targets else found[index][mask[index].bool()]
        torch.testing.assert_close(real, expected, atol=1e-4, rtol=1e-4)


def test_prefixes_of_different_layers_stacks_and_methods():
    model = tiny.make("bart")
    options = {
        "layers": {"layers": [1]},
        "encoder": {"stacks": ["encoder"]},
        "cross": {"stacks": ["cross"], "method": "prefix-tuning"},
        "short": {"layer_tokens": {0: 1, 2: 2}},
    }
    for tokens, (name, own) in enumerate(options.items(), 2):
        strong(prefixkit.apply(model, num_virtual_tokens=tokens, name=name, init="random", **own), name)
    names = [*options, None]
    inputs = tiny.inputs(model, batch=5)
    with prefixkit.rows(model, names):
        found = tiny.logits(model, **inputs)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(found[row], alone(model, name, **own)[0], atol=1e-4, rtol=1e-4)


def test_virtual_tokens_as_embeddings_in_rows():
    model = two(tiny.make("llama"), method="prompt-tuning")
    ids = tiny.tokens(3, 5)
    names = ["first", None, "second"]
    expected = [alone(model, name, input_ids=ids[row : row + 1])[0] for row, name in enumerate(names)]
    with prefixkit.rows(model, names):
        torch.testing.assert_close(tiny.logits(model, input_ids=ids), torch.stack(expected), atol=1e-4, rtol=1e-4)


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4)).eval()


def gptj():
    sizes = {"vocab_size": tiny.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    return GPTJForCausalLM(GPTJConfig(**sizes)).eval()


CACHE_ONLY = since("5.5", "the cache engine alone serves it")


@pytest.mark.parametrize(
    ("make", "engine"),
    [
        (bloom, "cache"),
        (gptj, "cache"),
        (lambda: tiny.make("llama"), "cache"),
        pytest.param(bloom, "attention", marks=CACHE_ONLY),
        pytest.param(gptj, "attention", marks=CACHE_ONLY),
        (lambda: tiny.make("llama"), "attention"),
    ],
)
def test_generate_in_rows_with_either_engine(make, engine):
    torch.manual_seed(0)
    model = two(make(), engine=engine)
    rows = [tiny.tokens(length, seed=length) for length in (3, 5, 2)]
    ids, mask = tiny.left_pad(rows)
    names = ["second", "first", None]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": tiny.PAD, "do_sample": False}
    for beams in (1, 2):
        with prefixkit.rows(model, names):
            found = model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **settings)
        for index, (row, name) in enumerate(zip(rows, names, strict=True)):
            if name is None:
                with prefixkit.disabled(model):
                    expected = model.generate(input_ids=row[None], num_beams=beams, **settings)
            else:
                prefixkit.activate(model, name)
                expected = model.generate(input_ids=row[None], num_beams=beams, **settings)
            assert torch.equal(found[index, -5:], expected[0, -5:])


def test_returned_sequences_have_their_rows_prefix():
    model = two(tiny.make("gpt2"))
    ids = tiny.tokens(2, 4)
    settings = {"max_new_tokens": 1, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    with prefixkit.rows(model, ["first", "second"]):
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[:, -1]
    for row, name in enumerate(["first", "second"]):
        best = alone(model, name, input_ids=ids[row : row + 1])[0, -1].argmax()
        assert (found[3 * row : 3 * row + 3] == best).all()


def test_static_cache_in_rows():
    model = two(tiny.make("llama"))
    ids = tiny.tokens(3, 4)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with prefixkit.rows(model, ["first", None, "second"]):
        plain = model.generate(input_ids=ids, **settings)
        static = model.generate(input_ids=ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(plain, static)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_implementations_agree_in_rows(attention):
    names = ["first", None, "second"]
    ids = tiny.tokens(3, 5)
    found = []
    for kind in ("eager", attention):
        model = two(tiny.make("llama", attention=kind))
        with prefixkit.rows(model, names), uncompiled():
            found.append(tiny.logits(model, input_ids=ids))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_dropout_of_the_prefix_in_rows():
    """Numbers are dropped in training, and not in evaluation."""
    model = two(tiny.make("gpt2"), prefix_dropout=0.5)
    ids = tiny.tokens(2, 4)
    with prefixkit.rows(model, ["first", "second"]):
        once, twice = (tiny.logits(model, input_ids=ids) for _ in range(2))
        assert torch.equal(once, twice)
        model.train()
        once, twice = (tiny.logits(model, input_ids=ids) for _ in range(2))
    assert not torch.allclose(once[0], twice[0])
    assert not torch.allclose(once[1], twice[1])


def test_the_block_ends():
    """Afterwards, also after an error, the active prefix serves every row, and generate is as it was."""
    model = two(tiny.make("gpt2"))
    inputs = tiny.inputs(model, batch=3)
    before, own = tiny.logits(model, **inputs), vars(model).get("generate")
    with pytest.raises(ZeroDivisionError), prefixkit.rows(model, ["first", None, "second"]):
        raise ZeroDivisionError
    assert torch.equal(tiny.logits(model, **inputs), before)
    assert vars(model).get("generate") is own


def test_a_graph_outlives_the_block():
    """The backward pass may come after it, under checkpointing too."""
    gradients = []
    for checkpointing in (False, True):
        model = two(tiny.make("llama"))
        for name in LENGTHS:
            prefixkit.unfreeze(model, name)
        model.train()
        if checkpointing:
            enable_checkpointing(model)
        with prefixkit.rows(model, ["first", None, "second"]):
            loss = model(input_ids=tiny.tokens(3, 5), labels=tiny.tokens(3, 5)).loss
        prefixkit.activate(model, "second")
        for name in LENGTHS:
            prefixkit.unfreeze(model, name)
        loss.backward()
        gradients.append([value.grad.clone() for value in model.prefixkit.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["first", "secnod"], "AttachmentError", "no prefix 'secnod' \\(did you mean 'second'\\?\\)"),
        ([None, None], "ConfigError", "names no prefix at all; use prefixkit.disabled"),
        ([], "ConfigError", "names no prefix at all"),
        ("first", "ConfigError", "names is 'first'; pass a list"),
        (["first", "gated"], "ConfigError", "'gated' has a gate"),
        (["first", "behind"], "ConfigError", "'behind' has an infix"),
        (["first", "unmoved"], "ConfigError", "one policy of positions"),
    ],
)
def test_rows_that_cannot_be(names, error, message):
    model = two(tiny.make("llama"))
    prefixkit.apply(model, num_virtual_tokens=2, name="gated", gate=True, positions="none")
    prefixkit.apply(model, num_virtual_tokens=2, name="behind", infix=True)
    prefixkit.apply(model, num_virtual_tokens=2, name="unmoved", positions="none")
    with pytest.raises(getattr(prefixkit, error), match=message), prefixkit.rows(model, names):
        pass
    assert model._prefixkit.rows is None


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_other_rows_than_were_named(batch):
    model = two(tiny.make("gpt2"))
    message = f"names the prefixes of 2 rows, and this call has {batch}"
    with prefixkit.rows(model, ["first", "second"]), pytest.raises(prefixkit.EngineError, match=message):
        model(input_ids=tiny.tokens(batch, 3))


def test_a_cache_of_other_rows_is_refused():
    model = two(tiny.make("llama"), engine="cache")
    ids = tiny.tokens(2, 3)
    with torch.no_grad(), prefixkit.rows(model, ["first", "second"]):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache))
    with (
        prefixkit.rows(model, ["second", "first"]),
        pytest.raises(prefixkit.EngineError, match="holds another prefix"),
    ):
        model(input_ids=ids[:, :1], past_key_values=cache)


# Found by attack


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_rows_whose_prefixes_have_other_lengths_in_each_layer(attention):
    """Flex attention's wider mask is kept for layers that are alike, which these are not."""
    model = tiny.make("llama", attention=attention)
    for name, tokens, own in (("first", 4, {}), ("second", 3, {"layer_tokens": {0: 1}})):
        strong(prefixkit.apply(model, num_virtual_tokens=tokens, name=name, init="random", **own), name)
    ids = tiny.tokens(3, 5)
    with uncompiled():
        with prefixkit.rows(model, ["first", "second", None]):
            found = tiny.logits(model, input_ids=ids)
        for row, name in enumerate(["first", "second", None]):
            expected = alone(model, name, input_ids=ids[row : row + 1])[0]
            torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "head", "message"),
    [
        (lambda: tiny.make("gpt2"), ["lm_head"], "tied with 'transformer.wte.weight'"),
        (lambda: tiny.make("gpt2"), ["transformer.wte"], "tied with 'lm_head.weight'"),
        (lambda: tiny.make("gpt2"), ["lm_head", "transformer.wte"], "tied with one another"),
        (lambda: tiny.make("gpt2"), ["transformer.h"], "a list of modules"),
        (lambda: tiny.make("gpt2"), ["transformer.h.1"], "contains attention"),
        (lambda: tiny.encoder("MaskedLM").eval(), ["cls"], "tied with"),
    ],
)
def test_heads_that_cannot_be_another_for_each_row(make, head, message):
    model = two(make(), head=head)
    with pytest.raises(prefixkit.ConfigError, match=message), prefixkit.rows(model, ["first", None]):
        pass
    assert prefixkit.names(prefixkit.activate(model, "first")) == ["first", "second"]


def test_autocast_forgets_the_head_that_was():
    model = two(classifier())
    for name, value in (("first", 1.0), ("second", -2.0)):
        head_of_its_own(model, name, value)
    ids = tiny.tokens(2, 5)
    expected = {name: alone(model, name, input_ids=ids) for name in ("first", "second", None)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("first", "second", None):
            torch.testing.assert_close(alone(model, name, input_ids=ids).float(), expected[name], atol=0.1, rtol=0.05)


def with_a_wrapped_head():
    model = two(classifier())
    for name, value in (("first", 1.0), ("second", 2.0)):
        head_of_its_own(model, name, value)
    model.add_adapter(LoraConfig(target_modules=["query", "classifier"], r=2))
    return model


@pytest.mark.parametrize(
    "action",
    [
        lambda model: prefixkit.activate(model, "first"),
        lambda model: prefixkit.apply(model, num_virtual_tokens=2, name="third"),
        lambda model: prefixkit.remove(model, "first"),
        lambda model: prefixkit.rows(model, ["first", "second"]).__enter__(),
    ],
)
def test_a_head_that_was_wrapped_is_seen_before_anything_changes(action):
    model = with_a_wrapped_head()
    inputs = {"input_ids": tiny.tokens(2, 4)}
    before, numbers = everything(model), tiny.logits(model, **inputs)
    with pytest.raises(prefixkit.AttachmentError, match="the head is not what it was"):
        action(model)
    assert_same(before, everything(model))
    assert prefixkit.config(model).name == "second"
    assert torch.equal(tiny.logits(model, **inputs), numbers)


def test_a_head_that_was_resized_is_seen():
    model = two(tiny.make("gpt2"), head=["lm_head"])
    model.resize_token_embeddings(70)
    with pytest.raises(prefixkit.AttachmentError, match=r"is \(70, 32\) now, and was \(62, 32\)"):
        prefixkit.activate(model, "first")
    assert prefixkit.config(model).name == "second"


def test_a_gradient_of_one_head_is_not_the_next_ones():
    model = two(classifier())
    ids, labels = tiny.tokens(2, 4), torch.tensor([0, 1])
    gradients = []
    for names in (("first", "second"), ("second",)):
        model.zero_grad()
        for name in names:
            prefixkit.activate(model, name)(input_ids=ids, labels=labels).loss.backward()
        gradients.append(model.classifier.weight.grad.clone())
    assert torch.equal(*gradients)


def test_numbers_of_another_prefix_are_not_taken_for_the_active_ones(tmp_path):
    model = two(tiny.make("gpt2"))
    numbers = {name: value for name, value in model.state_dict().items() if name.startswith("prefixkit.second")}
    prefixkit.activate(model, "first")
    with pytest.raises(prefixkit.CheckpointError, match="numbers of prefix 'second', and 'first' is active"):
        model.load_state_dict(numbers, strict=False)


def test_rows_in_a_compiled_model():
    model = two(tiny.make("gpt2"))
    ids = tiny.tokens(3, 5)
    compiled = torch.compile(model, backend="eager")
    for names in (["first", None, "second"], ["second", "second", None]):
        with torch.no_grad(), prefixkit.rows(model, names):
            expected = model(input_ids=ids).logits
            torch.testing.assert_close(compiled(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return (
        ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval(),
        "pixel_values",
        (3, 16, 16),
    )


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 8}
    config = WhisperConfig(**sizes, **more, num_mel_bins=8, vocab_size=tiny.VOCAB, **tiny.SPECIAL)
    return WhisperForAudioClassification(config).eval(), "input_features", (8, 16)


@pytest.mark.parametrize("active", ["first", "second"])
def test_heads_of_other_modules_in_rows(active):
    """A row whose prefix does not have the active one's head has the base's there."""
    model = classifier()
    for name, head in (("first", "classifier"), ("second", f"{model.base_model_prefix}.pooler")):
        strong(prefixkit.apply(model, num_virtual_tokens=3, name=name, init="random", head=[head]), name)
        with torch.no_grad():
            for value in model.get_submodule(head).parameters():
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = tiny.tokens(3, 4)
    for names in (["second", None, "second"], ["first", None, "first"], ["first", "second", None]):
        expected = [alone(model, name, input_ids=ids[row : row + 1])[0] for row, name in enumerate(names)]
        prefixkit.activate(model, active)
        with prefixkit.rows(model, names):
            torch.testing.assert_close(tiny.logits(model, input_ids=ids), torch.stack(expected))


@pytest.mark.parametrize("make", [vit, whisper])
def test_rows_of_pictures_and_of_sound(make):
    torch.manual_seed(0)
    model, name, shape = make()
    two(model)
    values = torch.randn(3, *shape)
    names = ["first", None, "second"]
    with prefixkit.rows(model, names):
        found = tiny.logits(model, **{name: values})
    for row, prefix in enumerate(names):
        expected = alone(model, prefix, **{name: values[row : row + 1]})[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_heads_follow_the_models_dtype():
    model = two(classifier()).to(torch.bfloat16)
    ids = tiny.tokens(3, 4)
    names = ["first", None, "second"]
    with prefixkit.rows(model, names):
        found = tiny.logits(model, input_ids=ids)
    for row, name in enumerate(names):
        expected = alone(model, name, input_ids=ids[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, atol=0.05, rtol=0.05)


def test_beams_of_the_models_own_settings():
    model = two(tiny.make("gpt2"))
    model.generation_config.num_beams = 3
    settings = GenerationConfig(max_new_tokens=3, pad_token_id=tiny.PAD)
    ids = tiny.tokens(2, 4)
    with prefixkit.rows(model, ["first", "second"]):
        found = model.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))
    assert len(found) == 2


@pytest.mark.parametrize("name", ["keys", "pop", "training", "forward", "float"])
def test_names_that_torch_has_for_itself(name):
    model = tiny.make("gpt2")
    with pytest.raises(prefixkit.ConfigError, match=f"name is '{name}', which torch's modules have"):
        prefixkit.apply(model, num_virtual_tokens=2, name=name)
    assert prefixkit.names(model) == []


def test_each_row_has_its_own_limit_of_positions():
    model = tiny.make("gpt2")
    prefixkit.apply(model, num_virtual_tokens=80, name="first")
    prefixkit.apply(model, num_virtual_tokens=2, name="second")
    ids = tiny.tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with prefixkit.rows(model, ["first", "second"]):
        model(input_ids=ids, attention_mask=mask)
        with pytest.raises(prefixkit.EngineError, match="position 109 is past"):
            model(input_ids=ids)


def test_rows_while_an_infix_is_active():
    model = two(tiny.make("llama"))
    ids = tiny.tokens(2, 4)
    with prefixkit.rows(model, ["first", "second"]):
        expected = tiny.logits(model, input_ids=ids)
    prefixkit.apply(model, num_virtual_tokens=2, name="behind", infix=True)
    with prefixkit.rows(model, iter(["first", "second"])):
        assert torch.equal(tiny.logits(model, input_ids=ids), expected)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, past_key_values=DynamicCache())


def test_unfreezing_one_that_is_not_active_lasts():
    model = two(tiny.make("gpt2"))
    for value in model.prefixkit.parameters():
        value.requires_grad_(False)
    prefixkit.activate(model, "first")
    prefixkit.unfreeze(model, "second")
    prefixkit.apply(model, num_virtual_tokens=2, name="third")
    assert "prefixkit.second.embedding.weight" in trained(model)
    prefixkit.activate(model, "second")
    assert trained(model) == {"prefixkit.second.embedding.weight"}


def test_window_policies_differ_where_there_are_no_windows():
    """As a prefix of PEFT and one of ours do."""
    model = tiny.make("llama")
    for name, window in (("first", "pinned"), ("second", "slide")):
        strong(prefixkit.apply(model, num_virtual_tokens=3, name=name, window=window, init="random"), name)
    ids = tiny.tokens(2, 4)
    with prefixkit.rows(model, ["first", "second"]):
        found = tiny.logits(model, input_ids=ids)
    for row, name in enumerate(["first", "second"]):
        torch.testing.assert_close(
            found[row], alone(model, name, input_ids=ids[row : row + 1])[0], atol=1e-5, rtol=1e-4
        )
