"""Prefixes of other libraries, by reference writers of their formats: same logits, and errors that change nothing."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import foreign
import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from test_checkpoint import assert_same, state
from test_peft_files import made, trained
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)
from versions import since

import prefixkit
from prefixkit import CheckpointError

LABELS = {**tiny.BERT, "num_labels": 3}
MODELS = {
    "gpt2": lambda: tiny.make("gpt2"),
    "llama": lambda: tiny.make("llama"),
    "mistral": lambda: tiny.make("mistral"),
    "bert": lambda: tiny.make("bert"),
    "bert-sentences": lambda: made(BertForSequenceClassification(BertConfig(**LABELS))),
    "bert-tokens": lambda: made(BertForTokenClassification(BertConfig(**LABELS))),
    "roberta-tokens": lambda: made(RobertaForTokenClassification(RobertaConfig(**LABELS))),
    "roberta-sentences": lambda: made(RobertaForSequenceClassification(RobertaConfig(**LABELS))),
    "bart": lambda: tiny.make("bart", encoder_layers=3, encoder_attention_heads=2),
    "bart-uneven": lambda: tiny.make("bart"),
    "t5": lambda: tiny.make("t5"),
}
ALONE = {"self_prefix": "decoder"}
ENCODER = {"self_prefix": "encoder"}
THREE = {"encoder_prefix": "encoder", "self_prefix": "decoder", "cross_prefix": "cross"}


def hub(stacks, **options):
    return lambda folder, model: foreign.adapterhub(folder, model, stacks=stacks, **options)


def writer(write, **options):
    return lambda folder, model: write(folder, model, **options)


SHIFT, NONE = "shift", "none"
MLP, FLAT = "prefix-tuning", "p-tuning-v2"
CASES = {
    "hub-gpt2": ("gpt2", hub(ALONE), NONE, MLP),
    "hub-gpt2-flat": ("gpt2", hub(ALONE, flat=True), NONE, FLAT),
    "hub-gpt2-left-out": ("gpt2", hub(ALONE, out=(1,)), NONE, MLP),
    "hub-gpt2-pool": ("gpt2", hub(ALONE, pool=True), NONE, MLP),
    "hub-llama": ("llama", hub(ALONE, base="model", safe=True), NONE, MLP),
    "hub-mistral": ("mistral", hub(ALONE, flat=True), NONE, FLAT),
    "hub-bert": ("bert-sentences", hub(ENCODER, base="bert", head=True), NONE, MLP),
    "hub-bert-flat": ("bert", hub(ENCODER, base="bert", flat=True), NONE, FLAT),
    "hub-bart": ("bart-uneven", hub(THREE, base="model"), NONE, MLP),
    "hub-bart-two": ("bart", hub({"self_prefix": "decoder", "cross_prefix": "cross"}), NONE, MLP),
    "hub-bart-flat": ("bart", hub(THREE, base="model", flat=True, safe=True), NONE, FLAT),
    "2021-gpt2": ("gpt2", writer(foreign.prefix_tuning_2021), SHIFT, MLP),
    "2021-gpt2-deep": ("gpt2", writer(foreign.prefix_tuning_2021, deep=True), SHIFT, MLP),
    "2021-gpt2-flat": ("gpt2", writer(foreign.prefix_tuning_2021_flat), SHIFT, FLAT),
    "2021-gpt2-words": ("gpt2", writer(foreign.prefix_tuning_2021_flat, words=True), SHIFT, FLAT),
    "2021-bart": ("bart", writer(foreign.prefix_tuning_2021), NONE, MLP),
    "v2-bert-sentences": ("bert-sentences", writer(foreign.p_tuning_v2), SHIFT, FLAT),
    "v2-bert-tokens": ("bert-tokens", writer(foreign.p_tuning_v2, projection=True), SHIFT, MLP),
    "v2-roberta-tokens": ("roberta-tokens", writer(foreign.p_tuning_v2, safe=True), SHIFT, FLAT),
    "cartridge-llama": ("llama", writer(foreign.cartridge, frozen=2), SHIFT, FLAT),
    "cartridge-old": ("llama", writer(foreign.cartridge, old=True), SHIFT, FLAT),
    "cartridge-lists": ("llama", writer(foreign.cartridge, lists=True, frozen=0), SHIFT, FLAT),
    "cartridge-segments": ("llama", writer(foreign.cartridge, segments=True, frozen=2), SHIFT, FLAT),
    "cartridge-free": ("gpt2", writer(foreign.cartridge, segments=True, frozen=0), SHIFT, FLAT),
}
FROZEN = {"cartridge-llama": 2, "cartridge-old": 1, "cartridge-segments": 2}
SINCE_5 = since("5.0", "BERT's attention is off the interface")
NAMES = [pytest.param(case, marks=[SINCE_5] if "bert" in case else []) for case in CASES]
"""Said loudly of one model, and asserted below."""


@pytest.mark.parametrize("case", NAMES)
def test_logits_are_the_library_s(case, tmp_path):
    """Positions and all; and what was loaded is saved and loaded as any prefix of ours."""
    name, write, positions, method = CASES[case]
    pairs = write(tmp_path, MODELS[name]())
    model = MODELS[name]()
    prefixkit.load(model, tmp_path)
    config = prefixkit.config(model)
    assert (config.positions, config.method, config.folded) == (positions, method, method == MLP)
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (foreign.P, FROZEN.get(case, 0))
    inputs = tiny.inputs(model)
    found = tiny.logits(model, **inputs)
    close(found, expected(name, model, pairs, config, inputs))
    bare = MODELS[name]()
    assert not torch.allclose(found, tiny.logits(bare, **inputs), atol=1e-3)
    prefixkit.save(model, tmp_path / "own")
    assert torch.equal(tiny.logits(prefixkit.load(bare, tmp_path / "own"), **inputs), found)


def expected(name, model, pairs, config, inputs):
    """From a bare model, with the head that was loaded."""
    bare = MODELS[name]()
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "prefixkit" not in key})
    shift = config.positions == SHIFT
    if bare.config.is_encoder_decoder:
        return foreign.written_out_logits(bare, pairs, inputs["input_ids"], inputs["decoder_input_ids"], shift=shift)
    if config.layers is not None:
        (kept,) = pairs.values()
        return one_by_one(bare, dict(zip(config.layers, kept, strict=True)), inputs["input_ids"])
    ids = inputs["input_ids"]
    if name == "mistral":
        # The prefix stays in sight of its window, which a cache cannot have; the first tokens see all that is before.
        ids = ids[:, : bare.config.sliding_window]
        bare.config.sliding_window = None
    return foreign.cached_logits(bare.double(), pairs, ids, shift=shift).float()


def one_by_one(bare, pairs, ids):
    """A prefix in some layers only, which no cache has: the attention written out."""
    heads, dim = foreign.shapes(bare, "decoder")[0]

    def forward(self, hidden_states, *args, **kwargs):
        q, k, v = (
            part.view(*part.shape[:2], heads, dim).transpose(1, 2) for part in self.c_attn(hidden_states).chunk(3, -1)
        )
        later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
        scores = (q @ k.transpose(-1, -2) / dim**0.5).masked_fill(later, -torch.inf)
        if self.layer_idx in pairs:
            key, value = (part.float().expand(len(q), -1, -1, -1) for part in pairs[self.layer_idx])
            scores = torch.cat([q @ key.transpose(-1, -2) / dim**0.5, scores], -1)
            v = torch.cat([value, v], 2)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bare.transformer.h[0].attn), "forward", forward)
        return tiny.logits(bare, input_ids=ids)


def close(found, wanted):
    found = found[:, : wanted.shape[1]]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_a_file_is_as_good_as_its_folder(tmp_path):
    pairs = foreign.cartridge(tmp_path, tiny.make("llama"), name="cache-step100.pt")
    foreign.cartridge(tmp_path, tiny.make("llama"), name="cache-step200.pt", frozen=2)
    message = (
        f"^{re.escape(repr(str(tmp_path)))} holds cache-step100.pt, cache-step200.pt; pass the path of the one to load$"
    )
    with pytest.raises(CheckpointError, match=message):
        prefixkit.load(tiny.make("llama"), tmp_path)
    model = prefixkit.load(tiny.make("llama"), tmp_path / "cache-step100.pt")
    ids = tiny.tokens(2, 7)
    close(tiny.logits(model, input_ids=ids), foreign.cached_logits(tiny.make("llama"), pairs, ids, shift=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype, tmp_path):
    """The numbers are taken as they are, into a prefix that can train."""
    pairs = foreign.cartridge(tmp_path, tiny.make("llama"), lists=True, frozen=0)
    content = torch.load(tmp_path / "cache-step100.pt")
    content = {name: [part.to(dtype) for part in parts] for name, parts in content.items()}
    torch.save(content, tmp_path / "cache-step100.pt")
    model = prefixkit.load(tiny.make("llama"), tmp_path, trainable=True)
    weight = model.prefixkit.default.embedding.weight
    assert (weight.dtype, weight.requires_grad) == (torch.float32, True)
    rounded = {"decoder": [tuple(part.to(dtype).double() for part in pair) for pair in pairs["decoder"]]}
    ids = tiny.tokens(2, 7)
    expected = foreign.cached_logits(tiny.make("llama").double(), rounded, ids, shift=True).float()
    close(tiny.logits(model, input_ids=ids), expected)


def test_frozen_tokens_stay_when_a_cartridge_trains_on(tmp_path):
    foreign.cartridge(tmp_path, tiny.make("llama"), frozen=2)
    model = prefixkit.load(tiny.make("llama"), tmp_path, trainable=True)
    weight = model.prefixkit.default.embedding.weight
    model(**tiny.inputs(model)).logits.square().mean().backward()
    moved = weight.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [False, False, True, True]


@SINCE_5
def test_beside_another_prefix(tmp_path):
    """What is read off the model is read off the bare one."""
    pairs = foreign.adapterhub(tmp_path, MODELS["bert"](), stacks=ENCODER, base="bert")
    model = MODELS["bert"]()
    prefixkit.apply(model, num_virtual_tokens=3, name="other")
    ids = tiny.tokens(2, 7)
    before = tiny.logits(model, input_ids=ids)
    prefixkit.load(model, tmp_path, name="theirs")
    bare = MODELS["bert"]().double()
    close(tiny.logits(model, input_ids=ids), foreign.cached_logits(bare, pairs, ids, shift=False).float())
    prefixkit.activate(model, "other")
    assert torch.equal(tiny.logits(model, input_ids=ids), before)
    with pytest.raises(prefixkit.AttachmentError, match="already has a prefix 'theirs'"):
        prefixkit.load(model, tmp_path, name="theirs")


def test_dropout_of_the_library_comes_along(tmp_path):
    foreign.adapterhub(tmp_path, tiny.make("gpt2"), stacks=ALONE, dropout=0.25)
    model = prefixkit.load(tiny.make("gpt2"), tmp_path)
    assert prefixkit.config(model).prefix_dropout == 0.25


def test_a_relative_bias_that_adapterhub_moves_is_refused(tmp_path):
    """Its queries are counted from 0 and its keys from the prefix's first column, so that all are P further apart."""
    model = tiny.make("t5")
    foreign.adapterhub(tmp_path, model, stacks=THREE)
    message = "in the encoder and the decoder AdapterHub moves the relative bias of real tokens"
    with pytest.raises(prefixkit.CheckpointError, match=message):
        prefixkit.load(model, tmp_path)
    assert prefixkit.names(model) == []


def drop(name):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(name)}


def put(name, value):
    """Another value for the tensors that end so, or one more."""

    def change(tensors):
        names = [key for key in tensors if key.endswith(name)] or [name]
        return {**tensors, **{key: value(tensors.get(key)) for key in names}}

    return change


FILES = {"hub": "pytorch_adapter.bin", "2021": "pytorch_model.bin", "v2": "pytorch_model.bin"}
BAD = {
    "hub, missing": ("hub-gpt2", drop("wte.weight"), "'.*wte.weight' is missing"),
    "hub, no bias": ("hub-gpt2", drop("trans.2.bias"), "'.*control_trans.2.bias' is missing"),
    "hub, gate": (
        "hub-gpt2",
        put("transformer.h.0.attn.prefix_gates.mine.weight", lambda _: torch.zeros(1)),
        "it holds '.*prefix_gates.*', and this prefix needs no such tensor",
    ),
    "hub, narrow": (
        "hub-gpt2-flat",
        put("control_trans", lambda old: old[:-1]),
        "control_trans has 767 numbers; 192 make one virtual token of this model",
    ),
    "hub, apart": (
        "hub-gpt2",
        put("trans.2.weight", lambda old: old[:, :-1]),
        ".*these do not fit together",
    ),
    "hub, layers": (
        "hub-gpt2",
        lambda tensors: {k: v[:64] if "trans.2" in k else v for k, v in tensors.items()},
        "self_prefix has 64 numbers for each virtual token; this GPT2LMHeadModel needs 192, for keys .*",
    ),
    "hub, lengths": (
        "hub-bart",
        put("self_prefix.wte.weight", lambda old: old[:-1]),
        "its prefixes have 4, 3, 4 virtual tokens",
    ),
    "2021, infix": (
        "2021-gpt2",
        put("wte2.weight", lambda _: torch.zeros(4, 32)),
        "it is an infix of the 2021 code, .*",
    ),
    "2021, more": ("2021-gpt2", put("lm_head.weight", lambda _: torch.zeros(1)), "it holds 'lm_head.weight', and .*"),
    "2021, one of three": ("2021-bart", drop("wte_enc.weight"), "'wte_enc.weight' is missing"),
    "2021, shape": (
        "2021-gpt2-words",
        put("control_trans", lambda old: old[:, :, 0]),
        r"control_trans is \(6, 1, 4, 8\); expected .*",
    ),
    "2021, type": ("2021-gpt2-flat", put("control_trans", lambda old: "text"), ".* is no plain tensor of .*"),
    "2021, whole numbers": ("2021-gpt2-flat", put("control_trans", lambda old: old.long()), ".* is no plain .*"),
    "v2, head": (
        "v2-bert-tokens",
        drop("classifier.weight"),
        "the head of this BertForTokenClassification needs 'classifier.weight', which is not there; .*",
    ),
    "v2, head's shape": (
        "v2-bert-tokens",
        put("classifier.weight", lambda old: old[:2]),
        r"tensor 'head.classifier.weight' in .* is \(2, 32\); this model needs \(3, 32\)",
    ),
    "v2, width": (
        "v2-bert-sentences",
        put("prefix_encoder.embedding.weight", lambda old: old[:, :64]),
        "prefix_encoder.embedding.weight has 64 numbers for each virtual token; .*",
    ),
    "v2, more": (
        "v2-bert-sentences",
        put("prefix_encoder.other", lambda _: torch.zeros(1)),
        "it holds 'prefix_encoder.other', and .*",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_and_change_nothing(case, tmp_path):
    source, change, message = BAD[case]
    name, write, _, _ = CASES[source]
    write(tmp_path, MODELS[name]())
    path = tmp_path / FILES[source.split("-")[0]]
    torch.save(change(torch.load(path)), path)
    refused(name, tmp_path, message)


def refused(name, path, message):
    model = MODELS[name]()
    before = state(model)
    with pytest.raises(CheckpointError, match=f"^(.*?: )?{message}$"):
        prefixkit.load(model, path)
    assert_same(before, state(model))


HUB_FIELDS = {
    "union": (
        {"architecture": "union"},
        "architecture is 'union', neither of PEFT nor prefix tuning of AdapterHub; .*",
    ),
    "gating": ({"use_gating": True}, "use_gating is true: a gate that looks at the input has no counterpart here"),
    "activation": ({"non_linearity": "wavy"}, "non_linearity is 'wavy', which transformers does not have"),
    "length": ({"prefix_length": 9}, "prefix_length is 9, and the tensors have 4; the files do not belong together"),
    "layers": ({"leave_out": "first"}, "leave_out is 'first'; it must be a list of layer numbers"),
    "dropout": ({"dropout": 2}, "prefix_dropout is 2; it must be at least 0 and below 1"),
}


@pytest.mark.parametrize("case", HUB_FIELDS)
def test_bad_fields_of_adapterhub(case, tmp_path):
    changes, message = HUB_FIELDS[case]
    foreign.adapterhub(tmp_path, tiny.make("gpt2"), stacks=ALONE)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    document["config"] |= changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    refused("gpt2", tmp_path, message)


def test_activations_other_than_tanh(tmp_path):
    """AdapterHub may have any of transformers' between its layers."""
    foreign.adapterhub(tmp_path, tiny.make("gpt2"), stacks=ALONE, non_linearity="relu")
    model = prefixkit.load(tiny.make("gpt2"), tmp_path)
    tensors = torch.load(tmp_path / "pytorch_adapter.bin")
    start = "transformer.prefix_tuning.prefix_tunings.mine.self_prefix."
    middle = tensors[f"{start}wte.weight"] @ tensors[f"{start}control_trans.0.weight"].T
    middle = (middle + tensors[f"{start}control_trans.0.bias"]).relu()
    flat = middle @ tensors[f"{start}control_trans.2.weight"].T + tensors[f"{start}control_trans.2.bias"]
    torch.testing.assert_close(model.prefixkit.default.embedding.weight, flat)


@SINCE_5
def test_other_models_are_refused(tmp_path):
    for case, other, message in [
        ("hub-gpt2", "llama", "it is for model type 'gpt2'; this LlamaForCausalLM is 'llama'"),
        ("v2-bert-tokens", "roberta-tokens", "it is of model type 'bert'; this RobertaForTokenClassification is .*"),
        ("2021-gpt2", "bart", "'wte_enc.weight' is missing"),
        ("2021-gpt2-flat", "bart", "control_trans has no MLP, which the 2021 code has for decoders alone"),
        ("2021-bart", "gpt2", "it holds .*, and this prefix needs no such tensor"),
        (
            "cartridge-llama",
            "gpt2",
            r"trainable_keys of layer 0 is \(1, 2, 2, 8\); .*needs floating-point \(1, 4, 2, 8\)",
        ),
        ("cartridge-llama", "bart", "a cartridge is for a decoder alone; this BartForConditionalGeneration is none"),
        ("v2-bert-sentences", "bart", "it is of model type 'bert'; this BartForConditionalGeneration is 'bart'"),
    ]:
        folder = tmp_path / f"{case}-{other}"
        folder.mkdir()
        name, write, _, _ = CASES[case]
        write(folder, MODELS[name]())
        refused(other, folder, message)


def test_a_head_of_another_build_is_refused(tmp_path):
    """P-tuning v2's RoBERTa has one linear layer for sentences, transformers' has two."""
    foreign.p_tuning_v2(tmp_path, MODELS["roberta-tokens"]())
    refused(
        "roberta-sentences",
        tmp_path,
        "the head of this RobertaForSequenceClassification needs 'classifier.dense.weight', which is not there; .*",
    )


def cartridge_content(**changes):
    parts = [torch.zeros(1, 2, 3, 8)] * 3
    return {"trainable_keys": parts, "trainable_values": parts, "frozen_keys": [], "frozen_values": [], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_keys": "text"}, "trainable_keys is str; expected a list of tensors"),
        ({"trainable_keys": []}, "trainable_keys and trainable_values are of 0 and 3 layers; this .* has 3"),
        ({"trainable_keys": [1, 2, 3]}, "trainable_keys of layer 0 is int; .* needs floating-point .*"),
        ({"frozen_keys": [torch.zeros(1, 2, 1, 8)] * 3}, "frozen_keys and frozen_values are of 3 and 0 layers; .*"),
        ({"step": 3}, "it holds 'step', and this prefix needs no such tensor"),
        ({"segment_info": [1]}, r"segment_info is \[1\]; expected \(start, end, is_frozen\) for each segment"),
        (
            {
                "segment_info": [(0, 3, False), (3, 6, True)],
                "segment_keys": [[torch.zeros(1, 2, 3, 8)] * 3] * 2,
                "segment_values": [[torch.zeros(1, 2, 3, 8)] * 3] * 2,
            },
            "some of its frozen tokens stand behind others that train; here only the first can stay",
        ),
    ],
)
def test_bad_cartridges(changes, message, tmp_path):
    torch.save(cartridge_content(**changes), tmp_path / "cache.pt")
    refused("llama", tmp_path, message)


def test_files_of_something_else(tmp_path):
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    refused("gpt2", tmp_path, "pytorch_model.bin holds 'layer.weight', which is not a prefix of prefixkit, PEFT, .*")
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    refused("gpt2", tmp_path, ".* holds a list; expected tensors by name")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("gpt2", tmp_path, "architecture is None, neither of PEFT nor prefix tuning of AdapterHub; .*")
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    refused("gpt2", tmp_path, ".* is not valid JSON: .*")


class Runs:
    """What pickle calls for it when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


HOLDERS = {
    "hub-gpt2": "pytorch_adapter.bin",
    "2021-gpt2": "pytorch_model.bin",
    "v2-bert-tokens": "pytorch_model.bin",
    "cartridge-llama": "cache-step100.pt",
    "peft": "adapter_model.bin",
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", HOLDERS)
def test_a_pickle_that_would_run_is_refused_and_does_not(case, old, tmp_path):
    trace = tmp_path / "it-ran"
    folder = tmp_path / "folder"
    folder.mkdir()
    name = CASES[case][0] if case in CASES else "gpt2"
    write_case(case, folder)
    path = folder / HOLDERS[case]
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": Runs(trace)}, path, _use_new_zipfile_serialization=not old)
    refused(name, folder, "(?s:.*) or holds more than tensors, and nothing else is ever unpickled: (?s:.*)")
    assert not trace.exists()
    path.write_bytes(pickle.dumps(Runs(trace)))
    refused(name, folder, "(?s:.*) or holds more than tensors, and nothing else is ever unpickled: (?s:.*)")
    assert not trace.exists()
    pickle.loads(path.read_bytes()).close()
    assert trace.exists(), "the pickle was harmless, so nothing was tested"


def test_no_pickle_is_read_by_a_torch_that_cannot_do_so_safely(tmp_path, monkeypatch):
    """CVE-2025-32434: before 2.6, ``weights_only=True`` did not keep a file from running code."""
    write_case("peft", tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    for version in ("2.5.1+cu121", "2.4.0"):
        monkeypatch.setattr(torch, "__version__", version)
        refused("gpt2", tmp_path, f".* is a pickle, which torch {re.escape(version)} cannot read safely .*")
    monkeypatch.undo()
    prefixkit.load(MODELS["gpt2"](), tmp_path)


def write_case(case, folder):
    if case == "peft":
        trained("gpt2").save_pretrained(folder, safe_serialization=False)
        return
    name, write, _, _ = CASES[case]
    write(folder, MODELS[name]())


FUZZED = {**HOLDERS, "peft-safe": "adapter_model.safetensors", "hub-llama": "adapter.safetensors"}
FUZZED |= {"v2-roberta-tokens": "model.safetensors", "cartridge-segments": "cache-step100.pt"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder for each format, written once."""
    folders = {}
    for case in FUZZED:
        folders[case] = tmp_path_factory.mktemp(case)
        if case == "peft-safe":
            trained("gpt2").save_pretrained(folders[case])
        else:
            write_case(case, folders[case])
    return folders


def attempt(case, folder):
    """Whether a bare model takes the folder; one that does not is as it was."""
    model = MODELS[CASES[case][0] if case in CASES else "gpt2"]()
    before = state(model)
    try:
        prefixkit.load(model, folder)
    except CheckpointError:
        assert_same(before, state(model))
        return False
    return True


@pytest.mark.parametrize("case", [pytest.param(case, marks=[SINCE_5] if "bert" in case else []) for case in FUZZED])
@given(data=st.data())
def test_any_truncation_or_flip_is_a_clear_error_or_the_same_shapes(case, written, tmp_path_factory, data):
    folder = shutil.copytree(written[case], tmp_path_factory.mktemp("damaged") / "it")
    path = folder / FUZZED[case]
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        assert not attempt(case, folder), "a truncated file was loaded"
        return
    # Mostly in what says what there is: the head, and the tail of a zip.
    edge = st.one_of(st.integers(0, min(3000, len(content)) - 1), st.integers(-min(3000, len(content)), -1))
    for place in data.draw(st.lists(edge, min_size=1, max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    attempt(case, folder)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
ODD_TENSORS = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(4, 192),
        torch.zeros(4, 32, dtype=torch.float64),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(4, 192, device="meta"),
        {},
        [],
        None,
        "text",
        3,
    ]
)


@SINCE_5
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", [case for case in HOLDERS if case != "peft"] + ["cartridge-segments"])
@given(data=st.data())
def test_any_other_content_is_a_clear_error(case, written, tmp_path_factory, data):
    folder = shutil.copytree(written[case], tmp_path_factory.mktemp("other") / "it")
    path = folder / FUZZED[case]
    content = torch.load(path, weights_only=False)
    for _ in range(data.draw(st.integers(1, 3))):
        wanted = [name for name in content if "bert" not in name]
        name = data.draw(st.sampled_from([*wanted, "prefix_encoder.more", "more"]))
        if data.draw(st.booleans()):
            content.pop(name, None)
        else:
            content[name] = data.draw(ODD_TENSORS)
    torch.save(content, path)
    attempt(case, folder)


@SINCE_5
@pytest.mark.parametrize("case", ["peft-safe", "hub-gpt2", "2021-gpt2", "v2-bert-tokens"])
@given(data=st.data())
def test_any_other_field_is_a_clear_error(case, written, tmp_path_factory, data):
    folder = shutil.copytree(written[case], tmp_path_factory.mktemp("fields") / "it")
    path = folder / ("adapter_config.json" if case in ("peft-safe", "hub-gpt2") else "config.json")
    document = json.loads(path.read_text())
    part = document["config"] if "config" in document and data.draw(st.booleans()) else document
    for name in data.draw(st.lists(st.sampled_from(sorted(part)), min_size=1, max_size=3)):
        part[name] = data.draw(ANYTHING)
    path.write_text(json.dumps(document))
    attempt(case, folder)
