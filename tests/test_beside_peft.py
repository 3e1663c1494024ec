"""What the comparison says of PEFT's prefix tuning, each statement beside the bare model as a control."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model, initialize_kv_prefix_from_past_key_values
from safetensors.torch import load_file
from transformers import BertConfig, BertForTokenClassification
from versions import since

import prefixkit

TOKENS = 5
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
pytestmark = [
    since("5.23", "PEFT 0.21.2 was not looked at in use"),
    # PEFT calls the first, and the tests the second, which has its name in every version that the suite runs on.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


def with_peft(model, task=TaskType.CAUSAL_LM, **options):
    """A prefix of PEFT, as large as a model's own keys."""
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **options)
    model = get_peft_model(model, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.normal_()
    return model


def prefix_of(model):
    return model.prompt_encoder.default.embedding.weight


def tagger():
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**tiny.BERT, num_labels=3)).eval()


def everything(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_is_right_in_generate_and_wrong_in_forward(name):
    rows = [tiny.tokens(3), tiny.tokens(9, seed=5)]
    ids, mask = tiny.left_pad(rows)
    model = with_peft(tiny.make(name))
    settings = {"max_new_tokens": 8, **GREEDY}
    padded = model.generate(input_ids=ids, attention_mask=mask, **settings)[0, 9:]
    assert torch.equal(padded, model.generate(**everything(rows[0][None]), **settings)[0, 3:])
    padded = tiny.logits(model, input_ids=ids, attention_mask=mask)[0, 6:]
    assert (padded - tiny.logits(model, **everything(rows[0][None]))[0]).abs().max() > 0.5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_implementations_and_the_cache_agree(name):
    models = [with_peft(tiny.make(name, attention=attention)) for attention in ("eager", "sdpa")]
    ids = tiny.tokens(2, 7)
    one, other = (tiny.logits(model, input_ids=ids) for model in models)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    generated = models[1].generate(**everything(ids), max_new_tokens=5, **GREEDY)
    for length in range(7, 12):
        so_far = generated[:, :length]
        assert torch.equal(tiny.logits(models[1], **everything(so_far))[:, -1].argmax(-1), generated[:, length])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_beams_are_those_of_prefixkit(name):
    peft, ours = with_peft(tiny.make(name)), tiny.make(name)
    prefixkit.apply(ours, num_virtual_tokens=TOKENS, init=prefix_of(peft).detach())
    settings = {"num_beams": 3, "max_new_tokens": 6, **GREEDY}
    inputs = everything(tiny.tokens(2, 7))
    assert torch.equal(peft.generate(**inputs, **settings), ours.generate(**inputs, **settings))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_static_cache_is_an_error(name):
    settings = {"cache_implementation": "static", "max_new_tokens": 4, **GREEDY}
    inputs = everything(tiny.tokens(2, 4))
    assert tiny.make(name).generate(**inputs, **settings).shape == (2, 8)
    with pytest.raises(AttributeError, match="max_cache_len"):
        with_peft(tiny.make(name)).generate(**inputs, **settings)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_of_decoders_is_an_error(name):
    model = tiny.make(name)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        with_peft(model)
    model = with_peft(tiny.make(name)).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(**everything(tiny.tokens(2, 7)))


def test_checkpointing_of_an_encoder_leaves_the_prefix_without_gradient():
    ids = tiny.tokens(2, 7)
    for checkpointing in (False, True):
        model = with_peft(tagger(), TaskType.TOKEN_CLS).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**everything(ids), labels=ids % 3).loss.backward()
        assert (prefix_of(model).grad is None) == checkpointing
        assert model.base_model.classifier.modules_to_save.default.weight.grad.any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_rows_see_each_other(name):
    rows = [tiny.tokens(4), tiny.tokens(6, seed=7)]
    packed = torch.cat(rows)[None]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    for model, right in ((tiny.make(name), True), (with_peft(tiny.make(name)), False)):
        apart = torch.cat([tiny.logits(model, input_ids=row[None]) for row in rows], dim=1)
        found = tiny.logits(model, input_ids=packed, position_ids=places, use_cache=False)
        assert ((found - apart).abs().max() < 1e-4) == right


def test_a_prefix_slides_out_of_a_window_as_context_does():
    peft, ours = with_peft(tiny.make("mistral")), tiny.make("mistral")
    prefixkit.apply(ours, num_virtual_tokens=TOKENS, init=prefix_of(peft).detach(), window="slide")
    ids = tiny.tokens(2, 12)
    torch.testing.assert_close(tiny.logits(peft, input_ids=ids), tiny.logits(ours, input_ids=ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("turn", [1, 3, 9])
def test_no_second_turn_on_the_cache_of_the_first(name, turn):
    """The cache that ``generate`` returned, handed back with the whole text so far, as for a bare model."""
    for model, right in ((tiny.make(name), True), (with_peft(tiny.make(name)), False)):
        first = model.generate(
            **everything(tiny.tokens(1, 4)), max_new_tokens=4, return_dict_in_generate=True, **GREEDY
        )
        text = everything(torch.cat([first.sequences, tiny.tokens(1, turn, seed=9)], dim=1))
        anew = model.generate(**text, max_new_tokens=6, **GREEDY)
        try:
            found = model.generate(**text, max_new_tokens=6, past_key_values=first.past_key_values, **GREEDY)
        except RuntimeError:
            found = None
        assert (found is not None and torch.equal(found, anew)) == right


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_has_one_prefix_and_layers_share_it(name):
    changes = {"num_layers": 4, "num_decoder_layers": 4, "d_kv": 8}
    if name == "bart":
        changes = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2}
    base = tiny.make(name, **changes)
    inputs = tiny.inputs(base)
    states = base.get_encoder()(input_ids=inputs["input_ids"]).last_hidden_state
    model = with_peft(base, TaskType.SEQ_2_SEQ_LM)
    output = model(**inputs, labels=inputs["decoder_input_ids"])
    torch.testing.assert_close(output.encoder_last_hidden_state, states)  # no prefix there
    output.loss.backward()
    by_slot = prefix_of(model).grad.view(TOKENS, 8, 32)  # 4 layers × (key, value)
    assert [bool(by_slot[:, slot].any()) for slot in range(8)] == [True, True, False, False] * 2


def test_a_head_of_token_classification_trains_and_is_saved(tmp_path):
    model = with_peft(tagger(), TaskType.TOKEN_CLS)
    head = model.base_model.classifier.modules_to_save.default
    torch.nn.init.normal_(head.weight)
    assert head.weight.requires_grad
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tagger(), tmp_path).eval()
    inputs = everything(tiny.tokens(2, 7))
    assert torch.equal(tiny.logits(again, **inputs), tiny.logits(model, **inputs))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_start_from_a_text_is_exact_without_an_mlp(name):
    base = tiny.make(name)
    text, ids = tiny.tokens(1, TOKENS, seed=8), tiny.tokens(2, 6)
    expected = tiny.logits(base, input_ids=torch.cat([text.expand(2, -1), ids], dim=1))[:, TOKENS:]
    past = base(input_ids=text, use_cache=True).past_key_values
    model = with_peft(base)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=past)
    torch.testing.assert_close(tiny.logits(model, input_ids=ids), expected, atol=1e-4, rtol=1e-4)
    model = with_peft(tiny.make(name), prefix_projection=True, encoder_hidden_size=16)
    with pytest.raises(ValueError, match="prefix_projection=True"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=past)


@pytest.mark.parametrize("projection", [False, True])
def test_a_file_is_small_and_safe_and_cannot_be_resumed(tmp_path, projection):
    model = with_peft(tiny.make("gpt2"), prefix_projection=projection, encoder_hidden_size=16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"prompt_embeddings": (TOKENS, 192)}
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * TOKENS * 192 + 500
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(tiny.make("gpt2"), tmp_path, is_trainable=True)


def test_adapter_names_of_rows_are_passed_over():
    model = with_peft(tiny.make("llama"))
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        model.prompt_encoder.other.embedding.weight.normal_()
    ids = tiny.tokens(2, 7)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(tiny.logits(model, input_ids=ids))
    assert (alone[0][1] - alone[1][1]).abs().max() > 0.1
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model, input_ids=ids, adapter_names=["default", "other"]), alone[0])
