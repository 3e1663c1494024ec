"""PEFT's files both ways, with PEFT itself as the oracle."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import safetensors.torch
import tiny
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from test_checkpoint import assert_same, state
from transformers import (
    BartForCausalLM,
    BartForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from versions import since

import prefixkit
from prefixkit import CheckpointError

TOKENS = 5
OPT = {"ffn_dim": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32}
OPT |= {"vocab_size": tiny.VOCAB, "max_position_embeddings": 96, "dropout": 0.0, **tiny.SPECIAL}
DECODERS = {
    "gpt2": lambda: tiny.make("gpt2"),
    "llama": lambda: tiny.make("llama"),
    "llama-mqa": lambda: tiny.make("llama-mqa"),
    "mistral": lambda: tiny.make("mistral"),
    "qwen2": lambda: made(Qwen2ForCausalLM(Qwen2Config(**tiny.llama_sizes()))),
    "bart-decoder": lambda: made(
        BartForCausalLM(tiny.bart(encoder_layers=5, encoder_attention_heads=2, is_decoder=True))
    ),
    "opt": lambda: made(OPTForCausalLM(OPTConfig(**OPT))),
}
SEQ2SEQ = {
    "t5": lambda: tiny.make("t5", d_kv=8, num_layers=3),
    "t5-even": lambda: tiny.make("t5", d_kv=8, num_layers=4, num_decoder_layers=4),
    "t5-deep-encoder": lambda: tiny.make("t5-deep-encoder", d_kv=8),
    "bart": lambda: tiny.make("bart", encoder_layers=3, encoder_attention_heads=2),
    "bart-even": lambda: tiny.make("bart", encoder_attention_heads=2, decoder_layers=2),
}
TASKS = {
    "bert-sentences": (lambda: made(BertForSequenceClassification(bert())), "SEQ_CLS"),
    "bert-tokens": (lambda: made(BertForTokenClassification(bert())), "TOKEN_CLS"),
    "bert-answers": (lambda: made(BertForQuestionAnswering(BertConfig(**tiny.BERT))), "QUESTION_ANS"),
    "bert-words": (lambda: tiny.make("bert"), "FEATURE_EXTRACTION"),
    "bert-body": (lambda: made(BertModel(bert())), "FEATURE_EXTRACTION"),
    "roberta-sentences": (
        lambda: made(RobertaForSequenceClassification(RobertaConfig(**tiny.BERT, num_labels=3))),
        "SEQ_CLS",
    ),
    "gpt2-sentences": (lambda: made(GPT2ForSequenceClassification(tiny.gpt2(num_labels=3))), "SEQ_CLS"),
}
EVERY = {
    **{name: (make, "CAUSAL_LM") for name, make in DECODERS.items()},
    **{name: (make, "SEQ_2_SEQ_LM") for name, make in SEQ2SEQ.items()},
    **TASKS,
}
SINCE_5 = since("5.0", "BERT takes a prefix, or a cache from PEFT, in no way that is right")
NAMES = [pytest.param(name, marks=[SINCE_5] if "bert" in name else []) for name in EVERY]
KINDS = ("flat", "projection", "cartridge")
# PEFT calls what transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:Could not find a config file:UserWarning"
)


def bert():
    return BertConfig(**tiny.BERT, num_labels=3)


def made(model):
    """The same weights on every call, large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def peft_config(kind, task):
    if kind == "cartridge":
        return CartridgeConfig(task_type=task, num_virtual_tokens=TOKENS, num_frozen_tokens=2)
    projection = {"prefix_projection": True, "encoder_hidden_size": 12} if kind == "projection" else {}
    return PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **projection)


def trained(name, kind="flat", dtype=torch.float32):
    """A PEFT model whose prefix and head are not what they start from."""
    make, task = EVERY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers deprecates
        model = get_peft_model(make().to(dtype), peft_config(kind, task)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(generator=generator)
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path:
                parameter.normal_(generator=generator)
    return model


def numbers(model, **inputs):
    """All float outputs that both libraries name, in one row."""
    with torch.no_grad():
        output = model(**inputs)
    names = [name for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in output]
    assert names
    return torch.cat([output[name].flatten() for name in names])


def assert_equal(found, expected):
    tolerance = {"atol": 2e-6, "rtol": 1e-5} if found.dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, kind, dtype, tmp_path):
    """PEFT's folder, loaded here, gives PEFT's logits; saved for PEFT again, PEFT gives them too."""
    peft = trained(name, kind, dtype)
    peft.save_pretrained(tmp_path / "theirs")
    model = EVERY[name][0]().to(dtype)
    inputs = tiny.inputs(model)
    expected = numbers(peft, **inputs)
    assert_different(numbers(model, **inputs), expected)
    assert prefixkit.load(model, tmp_path / "theirs") is model
    assert not any(value.requires_grad for value in model.parameters())
    assert_equal(numbers(model, **inputs), expected)
    config = prefixkit.config(model)
    assert (config.positions, config.window, config.num_virtual_tokens) == ("shift", "slide", TOKENS)
    assert config.num_frozen_tokens == (2 if kind == "cartridge" else 0)
    assert (config.method, config.folded) == (
        ("prefix-tuning", True) if kind == "projection" else ("p-tuning-v2", False)
    )
    prefixkit.save(model, tmp_path / "again", format="peft")
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = PeftModel.from_pretrained(EVERY[name][0]().to(dtype), tmp_path / "again").eval()
    assert torch.equal(numbers(back, **inputs), expected)
    assert back.peft_config["default"].peft_type.value == ("CARTRIDGE" if kind == "cartridge" else "PREFIX_TUNING")


def assert_different(found, expected):
    assert found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), atol=1e-3)


METHODS = [
    pytest.param(name, method, marks=[SINCE_5] if "bert" in name else [])
    for name in EVERY
    for method in ("p-tuning-v2", "prefix-tuning")
    # An MLP gives no two layers the same prefix.
    if not (name.endswith("-even") and method == "prefix-tuning")
]


def ours(name, method="p-tuning-v2", **options):
    """A model with a prefix of ours that PEFT can express, head included."""
    model = EVERY[name][0]()
    two = {"stacks": ["decoder"]} if model.config.is_encoder_decoder else {}
    prefixkit.apply(model, method=method, num_virtual_tokens=TOKENS, **{"window": "slide", **two, **options})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
        if name in ("t5-even", "bart-even"):
            weight = model.prefixkit.default.embedding.weight
            half = weight.shape[1] // 2
            weight[:, half:] = weight[:, :half]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "method"), METHODS)
def test_ours_there_and_back(name, method, dtype, tmp_path):
    """Saved for PEFT, PEFT gives our logits; its own save of that gives them here again."""
    model = ours(name, method).to(dtype)
    inputs = tiny.inputs(model)
    expected = numbers(model, **inputs)
    prefixkit.save(model, tmp_path / "ours", format="peft")
    assert torch.equal(numbers(model, **inputs), expected)
    assert prefixkit.config(model).folded is False
    peft = PeftModel.from_pretrained(EVERY[name][0]().to(dtype), tmp_path / "ours").eval()
    assert_equal(numbers(peft, **inputs), expected)
    peft.save_pretrained(tmp_path / "theirs")
    fresh = prefixkit.load(EVERY[name][0]().to(dtype), tmp_path / "theirs", trainable=True)
    assert_equal(numbers(fresh, **inputs), expected)
    trainable = {path for path, value in fresh.named_parameters() if value.requires_grad}
    head = {path for path, value in model.named_parameters() if value.requires_grad and "prefixkit" not in path}
    assert trainable == head | {"prefixkit.default.embedding.weight"}
    # What was loaded is a prefix like any other.
    prefixkit.save(fresh, tmp_path / "own")
    last = prefixkit.load(EVERY[name][0]().to(dtype), tmp_path / "own")
    assert torch.equal(numbers(last, **inputs), numbers(fresh, **inputs))


def greedy(model, ids, steps):
    """Token by token through whole forwards; PEFT's own ``generate`` is another on T5 with transformers 4."""
    mask = torch.ones_like(ids)
    two = model.config.is_encoder_decoder
    found = torch.full((len(ids), 1), model.config.decoder_start_token_id) if two else ids
    for _ in range(steps):
        inputs = {"decoder_input_ids": found} if two else {}
        logits = tiny.logits(
            model, input_ids=ids if two else found, **inputs, **({"attention_mask": mask} if two else {})
        )
        found = torch.cat([found, logits[:, -1:].argmax(-1)], dim=1)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5", "bart"])
def test_generation_is_peft_s(name, tmp_path):
    peft = trained(name)
    peft.save_pretrained(tmp_path)
    model = prefixkit.load(EVERY[name][0](), tmp_path)
    ids = tiny.tokens(2, 6)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found, greedy(peft, ids, 6))


def test_pickled_weights_of_peft(tmp_path):
    peft = trained("llama")
    peft.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    model = prefixkit.load(tiny.make("llama"), tmp_path)
    inputs = tiny.inputs(model)
    assert_equal(numbers(model, **inputs), numbers(peft, **inputs))


def test_embeddings_that_were_resized_come_along(tmp_path):
    """PEFT writes the embeddings then, tied ones twice; they are a head here."""
    peft = trained("gpt2")
    with torch.no_grad():
        peft.base_model.transformer.wte.weight.add_(0.1)
    peft.save_pretrained(tmp_path, save_embedding_layers=True)
    model = prefixkit.load(tiny.make("gpt2"), tmp_path)
    inputs = tiny.inputs(model)
    assert_equal(numbers(model, **inputs), numbers(peft, **inputs))
    assert prefixkit.config(model).head == ("transformer.wte", "lm_head")
    prefixkit.save(model, tmp_path / "own")
    saved = safetensors.torch.load_file(tmp_path / "own" / "prefix.safetensors")
    assert sorted(saved) == ["embedding.weight", "head.transformer.wte.weight"]


@pytest.mark.parametrize("name", [pytest.param("bert-sentences", marks=SINCE_5), "gpt2-sentences"])
def test_a_head_that_did_not_train_is_in_the_file_all_the_same(name, tmp_path):
    """PEFT looks for the classifier in every file of its kind."""
    model = ours(name, head=False)
    prefixkit.save(model, tmp_path, format="peft")
    peft = PeftModel.from_pretrained(EVERY[name][0](), tmp_path).eval()
    inputs = tiny.inputs(model)
    assert_equal(numbers(peft, **inputs), numbers(model, **inputs))


@pytest.mark.parametrize(
    ("name", "head"),
    [pytest.param("bert-sentences", "classifier", marks=SINCE_5), ("gpt2-sentences", "score")],
)
def test_saving_while_disabled_takes_the_tuned_head(name, head, tmp_path):
    model = ours(name)
    tuned = model.get_submodule(head).weight.detach().clone()
    with prefixkit.disabled(model):
        prefixkit.save(model, tmp_path, format="peft")
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.{head}.weight"], tuned)


def test_prompt_tuning_is_read_and_then_saved(tmp_path):
    """Its embeddings become the keys and values that the base makes of them."""
    model = ours("llama", "prompt-tuning", init="random", window="pinned")
    prefixkit.save(model, tmp_path, format="peft")
    peft = PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval()
    inputs = tiny.inputs(model)
    torch.testing.assert_close(numbers(peft, **inputs), numbers(model, **inputs), atol=2e-5, rtol=1e-4)


OWN = "save it without format='peft'"
REFUSALS = {
    "gate": (
        "gpt2",
        {"gate": True, "positions": "none", "window": "pinned"},
        f"it has gate=True, and PEFT has no such thing; {OWN}",
    ),
    "infix": ("gpt2", {"infix": True, "window": "pinned"}, f"it has infix=True, and PEFT has no such thing; {OWN}"),
    "layer_tokens": (
        "gpt2",
        {"layer_tokens": {1: 2}},
        f"it has layer_tokens={{1: 2}}, and PEFT has no such thing; {OWN}",
    ),
    "positions": (
        "llama",
        {"positions": "none"},
        "it has positions='none', and PEFT's first real token stands behind the prefix; train with positions='shift', "
        f"or {OWN}",
    ),
    "window": (
        "mistral",
        {"window": "pinned"},
        "it has window='pinned', and PEFT's slides out of this model's sliding windows (4 positions); train with "
        f"window='slide', or {OWN}",
    ),
    "layers": (
        "gpt2",
        {"layers": [0, 1]},
        f"it stands in layers [0, 1] of 3, and PEFT's in all; apply it without layers=, or {OWN}",
    ),
    "stacks": (
        "bart",
        {"stacks": None},
        "it stands in cross, decoder, encoder, and PEFT's in decoder self-attention only; apply it with "
        f"stacks=('decoder',), or {OWN}",
    ),
    "cross": (
        "t5",
        {"stacks": ["cross"]},
        "it stands in cross, and PEFT's in decoder self-attention only; apply it with stacks=('decoder',), or " + OWN,
    ),
    "head": (
        "bert-sentences",
        {"head": ["bert.pooler"]},
        "bert.pooler.dense.bias, bert.pooler.dense.weight trained with it, and the heads that PEFT looks for in a "
        f"BertForSequenceClassification are: classifier, score; apply it with head=False, or {OWN}",
    ),
    "language model's head": (
        "gpt2",
        {"head": ["lm_head"]},
        "lm_head.weight trained with it, and the heads that PEFT looks for in a GPT2LMHeadModel are: none; apply it "
        f"with head=False, or {OWN}",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_peft_cannot_express_is_refused(case, tmp_path):
    name, options, reason = REFUSALS[case]
    model = ours(name, **options)
    before = state(model)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'PEFT cannot express this prefix: {reason}')}$"):
        prefixkit.save(model, tmp_path / "out", format="peft")
    assert_same(before, state(model))
    assert not (tmp_path / "out").exists()


def test_memory_is_refused(tmp_path):
    model = tiny.make("gpt2")
    prefixkit.apply(model, "prefix-memory", num_virtual_tokens=1)
    with pytest.raises(
        CheckpointError, match="^PEFT cannot express this prefix: method 'prefix-memory' gives a memory"
    ):
        prefixkit.save(model, tmp_path, format="peft")


@pytest.mark.parametrize("name", ["t5-even", "bart-even"])
def test_layers_that_share_nothing_are_refused(name, tmp_path):
    model = ours(name)
    with torch.no_grad():
        model.prefixkit.default.embedding.weight[0, 0] += 1
    message = "^PEFT cannot express this prefix: of an encoder-decoder with an even number of layers, it gives layers"
    with pytest.raises(CheckpointError, match=message):
        prefixkit.save(model, tmp_path, format="peft")


def test_a_body_that_takes_no_cache_is_refused(tmp_path):
    sizes = {"vocab_size": tiny.VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    model = made(DistilBertModel(DistilBertConfig(**sizes)))
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    message = "^PEFT cannot express this prefix: PEFT hands it over in past_key_values, which DistilBertModel"
    with pytest.raises(CheckpointError, match=message):
        prefixkit.save(model, tmp_path, format="peft")


def test_task_models_that_peft_runs_in_another_way_are_refused(tmp_path):
    """A head of two layers on a pooled body, sentences to choose from, and an encoder-decoder's head."""
    piped = made(BertForSequenceClassification(bert()))
    piped.classifier = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 3))
    several = made(BertForMultipleChoice(bert()))
    both = made(BartForSequenceClassification(tiny.bart(num_labels=3)))
    for model, reason, options in [
        (piped, "PEFT calls the body and the head of a BertForSequenceClassification by itself, .*", {}),
        (several, "PEFT passes past_key_values, which .*|PEFT has no task of multiple choice, .*", {"head": False}),
        (both, "of encoder-decoders PEFT serves language models, .*", {"stacks": ["decoder"], "head": False}),
    ]:
        prefixkit.apply(model, num_virtual_tokens=TOKENS, **options)
        with pytest.raises(CheckpointError, match=f"^PEFT cannot express this prefix: ({reason})$"):
            prefixkit.save(model, tmp_path, format="peft")


def test_uneven_shapes_are_refused(tmp_path):
    """Latent attention has keys and values of two sizes, and keeps latents in its cache."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 3,
    }
    sizes = tiny.llama_sizes(num_key_value_heads=4, moe_intermediate_size=16)
    model = made(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent, **experts)))
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with pytest.raises(CheckpointError, match="^PEFT cannot express this prefix: "):
        prefixkit.save(model, tmp_path, format="peft")


def test_unknown_format(tmp_path):
    with pytest.raises(
        prefixkit.ConfigError, match=r"^format is 'pefd' \(did you mean 'peft'\?\); possible: prefixkit, peft$"
    ):
        prefixkit.save(ours("gpt2"), tmp_path, format="pefd")


def test_two_checkpoints_never_share_a_folder(tmp_path):
    model = ours("gpt2")
    prefixkit.save(model, tmp_path / "own")
    with pytest.raises(CheckpointError, match="holds a checkpoint of prefixkit, which load would take for this"):
        prefixkit.save(model, tmp_path / "own", format="peft")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"holds another adapter \(LORA\); name another folder$"):
        prefixkit.save(model, tmp_path, format="peft")
    target = tmp_path / "taken"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="it is a file; name a folder$"):
        prefixkit.save(model, target, format="peft")


def changed(tmp_path, name, tensors=None, **fields):
    """A folder of PEFT's with other fields, or other tensors."""
    trained(name).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    if tensors is not None:
        saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        safetensors.torch.save_file(tensors(saved), tmp_path / "adapter_model.safetensors")


def only(name, value):
    return lambda saved: {**saved, name: value}


BAD = {
    "method": ({"peft_type": "LORA"}, None, "it holds LORA of PEFT; prefixkit reads PREFIX_TUNING and CARTRIDGE. .*"),
    "length": ({"num_virtual_tokens": 6}, None, "num_virtual_tokens is 6, and prompt_embeddings has 5; .*"),
    "length's kind": ({"num_virtual_tokens": "5"}, None, "num_virtual_tokens is '5'; it must be a whole number .*"),
    "layers": ({"num_layers": 2}, None, r"num_layers is 2; .* stands in layers \[0, 1, 2\]"),
    "heads": ({"num_attention_heads": 2}, None, "num_attention_heads is 2 and token_dim is 32, heads of 16; .*"),
    "stacks": ({"num_transformer_submodules": 2}, None, "num_transformer_submodules is 2; PEFT has 2 for an enc.*"),
    "missing": ({}, lambda saved: {"other": torch.zeros(2)}, "'prompt_embeddings' is missing"),
    "more": ({}, only("more", torch.zeros(2)), "it holds 'more', and this prefix needs no such tensor"),
    "kind": ({}, only("prompt_embeddings", torch.zeros(5, 192, dtype=torch.int64)), ".* is no plain tensor of .*"),
    "empty": ({}, only("prompt_embeddings", torch.zeros(0, 192)), ".* is no plain tensor of .*"),
    "dims": ({}, only("prompt_embeddings", torch.zeros(960)), r"'prompt_embeddings' is \(960,\); it must have 2 .*"),
    "width": ({}, only("prompt_embeddings", torch.zeros(5, 96)), r"prompt_embeddings is \(5, 96\); 3 layers with .*"),
    "head": (
        {},
        only("base_model.scorer.weight", torch.zeros(2, 2)),
        "the prefix in .* does not fit this GPT2LMHeadModel: head names 'scorer.weight', .*",
    ),
    "frozen": (
        {"peft_type": "CARTRIDGE", "num_frozen_tokens": 5},
        None,
        "num_frozen_tokens is 5 of 5, so that nothing would train; .*",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_change_nothing(case, tmp_path):
    fields, tensors, message = BAD[case]
    changed(tmp_path, "gpt2", tensors, **fields)
    model = tiny.make("gpt2")
    before = state(model)
    with pytest.raises(CheckpointError, match=f"^(.*hold[^:]*: |/[^:]*: )?{message}$"):
        prefixkit.load(model, tmp_path)
    assert_same(before, state(model))


def test_a_model_that_peft_would_not_run_right(tmp_path):
    """A plain cache in an encoder-decoder, and a prefix for another number of heads."""
    changed(tmp_path, "bart", num_transformer_submodules=1, task_type="SEQ_CLS")
    with pytest.raises(CheckpointError, match="num_transformer_submodules is 1; "):
        prefixkit.load(EVERY["bart"][0](), tmp_path)
    other = tmp_path / "llama"
    trained("llama").save_pretrained(other)
    with pytest.raises(CheckpointError, match="num_attention_heads is 2 and token_dim is 16, heads of 8; "):
        prefixkit.load(tiny.make("llama-mqa"), other)


@pytest.mark.parametrize(
    ("name", "sizes"), [("gpt2", {"n_layer": 2}), ("t5", {"num_layers": 2, "num_decoder_layers": 2})]
)
def test_a_deeper_model_s_prefix_is_refused(name, sizes, tmp_path):
    trained(name).save_pretrained(tmp_path)
    shallow = tiny.make(name, **sizes, **({"d_kv": 8} if name == "t5" else {}))
    with pytest.raises(CheckpointError, match=r"num_layers is 3; .* stands in layers \[0, 1\]$"):
        prefixkit.load(shallow, tmp_path)


def test_our_own_files_come_first(tmp_path):
    """A Trainer with a LoRA beside the prefix leaves PEFT's files in the same folder."""
    model = ours("gpt2")
    prefixkit.save(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    fresh = prefixkit.load(copy.deepcopy(tiny.make("gpt2")), tmp_path)
    inputs = tiny.inputs(fresh)
    assert torch.equal(numbers(fresh, **inputs), numbers(model, **inputs))


@pytest.mark.parametrize("modules", [["lm_head"], ["wte"], ["wte", "lm_head"]])
def test_weights_that_peft_trained_apart_are_not_tied_again(modules, tmp_path):
    """PEFT trains a copy, and the other end of the tie stays; here both are one parameter."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=modules)
    model = get_peft_model(tiny.make("gpt2"), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    if not [name for name in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors") if "weight" in name]:
        pytest.skip("this PEFT does not save these modules")
    bare = tiny.make("gpt2")
    with pytest.raises(prefixkit.CheckpointError, match="are one in this model; load it into a model with tie_word"):
        prefixkit.load(bare, tmp_path)
    assert prefixkit.names(bare) == []
