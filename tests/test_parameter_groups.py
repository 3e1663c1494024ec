"""Groups for an optimizer: each number that trains is in one of them, at the rate that suits it."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_methods import TestLowRank as LowRank

import prefixkit
from prefixkit.errors import AttachmentError, ConfigError, MethodError

# PEFT asks the model under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def rates(model, **given):
    """The rate of each parameter by its name, after a look that each that trains is there once."""
    names = {id(value): name for name, value in model.named_parameters()}
    groups = prefixkit.parameter_groups(model, **given)
    found = [(names[id(value)], group["lr"]) for group in groups for value in group["params"]]
    assert sorted(name for name, _ in found) == sorted(
        n for n, value in model.named_parameters() if value.requires_grad
    )
    return dict(found)


def rates_by(model, depth, **given):
    """The rate by the first parts of the name, where it is one and the same."""
    found = {(".".join(name.split(".")[:depth]), rate) for name, rate in rates(model, **given).items()}
    assert len({part for part, _ in found}) == len(found)
    return dict(found)


def classifier(method="prefix-tuning", **options):
    return prefixkit.apply(tiny.encoder("SequenceClassification"), method, num_virtual_tokens=4, **options)


def lora(*targets, **options):
    return LoraConfig(target_modules=list(targets), r=2, **options)


def test_prefix_and_head_each_at_its_rate():
    model = classifier()
    assert rates_by(model, 1) == {"prefixkit": 0.0005, "classifier": 0.1}
    assert rates_by(model, 1, lr=0.001, head_lr=0.03) == {"prefixkit": 0.001, "classifier": 0.03}
    assert [group["name"] for group in prefixkit.parameter_groups(model)] == ["prefixkit.default", "head"]
    with pytest.warns(UserWarning, match="^learning rate 0 is far from"):
        assert rates_by(model, 1, lr=0) == {"prefixkit": 0, "classifier": 0.1}


def test_several_prefixes_go_by_the_method_of_each():
    """One's name begins with the other's, and one is called as another group is."""
    model = prefixkit.apply(tiny.make("gpt2"), "prefix-tuning", num_virtual_tokens=4, name="head")
    prefixkit.apply(model, "p-tuning-v2", num_virtual_tokens=4, name="head_two")
    prefixkit.unfreeze(model, "head")
    assert rates_by(model, 2) == {"prefixkit.head": 0.0005, "prefixkit.head_two": 0.1}


def test_a_step_goes_by_the_rate_of_each():
    """With plain SGD a step is the rate times the gradient, written out."""
    model = classifier().train()
    optimizer = torch.optim.SGD(prefixkit.parameter_groups(model))
    model(**tiny.inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    optimizer.step()
    for name, value in model.named_parameters():
        if value.requires_grad:
            rate = 0.1 if name.startswith("classifier.") else 0.0005
            torch.testing.assert_close(value, before[name] - rate * value.grad)


def test_a_gate_does_not_have_the_rate_of_an_mlp():
    model = prefixkit.apply(tiny.make("gpt2"), "prefix-tuning", num_virtual_tokens=4, gate=True, positions="none")
    assert {rate for name, rate in rates(model).items() if name.endswith(".gate")} == {0.1}
    assert {rate for name, rate in rates(model, lr=0.001).items() if not name.endswith(".gate")} == {0.001}


def test_a_tied_head_is_there_once_and_needs_a_rate_of_its_own():
    model = prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4, head=["lm_head"])
    with pytest.raises(
        ConfigError,
        match=r"^'lm_head': a head of your own choice, which may not be new; give its learning rate, head_lr= \(0.1 su",
    ):
        prefixkit.parameter_groups(model)
    assert rates(model, head_lr=0.001) == {"prefixkit.default.embedding.weight": 0.1, "transformer.wte.weight": 0.001}


def test_a_head_rate_without_a_head():
    with pytest.raises(ConfigError, match=r"^head_lr is 0.05, and no head trains with this prefix; apply\(head="):
        prefixkit.parameter_groups(classifier(head=False), head_lr=0.05)


def test_what_is_neither_prefix_nor_head_needs_a_rate():
    model = classifier("p-tuning-v2")
    norms = {name: value for name, value in model.named_parameters() if name.endswith("LayerNorm.weight")}
    assert len(norms) > 3
    for value in norms.values():
        value.requires_grad_(True)
    named = re.escape(", ".join(map(repr, list(norms)[:3])))
    message = "set to train, and neither prefix nor head; give a learning rate, other_lr=, or freeze them"
    with pytest.raises(ConfigError, match=f"^{named} and {len(norms) - 3} more: {message}$"):
        prefixkit.parameter_groups(model)
    found = rates(model, other_lr=0.0001)
    assert {name for name, rate in found.items() if rate == 0.0001} == norms.keys()


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
def test_a_lora_keeps_its_rate_wherever_it_is(method):
    """In the body, on the head, and in the MLP that makes the prefix."""
    model = tiny.encoder("SequenceClassification")
    model.add_adapter(lora("query", "classifier"))
    prefixkit.apply(model, method, num_virtual_tokens=4)
    if method == "prefix-tuning":
        get_peft_model(model.prefixkit, lora("transform.0"))
        prefixkit.unfreeze(model)
    found = rates(model, other_lr=1e-4)
    assert {name for name, rate in found.items() if rate == 1e-4} == {name for name in found if "lora_" in name}
    assert any("classifier" in name and "lora_" in name for name in found)


def test_a_head_that_peft_saves_is_a_head():
    model = tiny.encoder("SequenceClassification")
    get_peft_model(model, lora("query", task_type="SEQ_CLS", modules_to_save=["classifier"]))
    found = rates_by(prefixkit.apply(model, num_virtual_tokens=4), 1, other_lr=1e-4)
    assert found == {"prefixkit": 0.1, "classifier": 0.1, "bert": 1e-4}


def test_a_prefix_that_peft_froze_is_not_left_out_in_silence():
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=4)
    model.add_adapter(lora("q_proj", task_type="CAUSAL_LM"))
    with pytest.raises(AttachmentError, match=r"^no prefix of this model trains; call prefixkit.unfreeze \(PEFT"):
        prefixkit.parameter_groups(model, other_lr=1e-4)
    assert set(rates(prefixkit.unfreeze(model), other_lr=1e-4).values()) == {0.1, 1e-4}


def test_a_model_around_the_one_with_the_prefix():
    model = prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4)
    with pytest.raises(
        AttachmentError, match="^this DataParallel has no prefix; pass the model inside, 'module', a GPT2"
    ):
        prefixkit.parameter_groups(torch.nn.DataParallel(model))
    for bare in (tiny.make("gpt2"), "a name"):
        with pytest.raises(AttachmentError, match="has no prefix; call prefixkit.apply or prefixkit.load first$"):
            prefixkit.parameter_groups(bare)


@pytest.mark.parametrize("argument", ["lr", "head_lr", "other_lr"])
@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), "1e-4", True])
def test_a_rate_is_a_finite_number_of_0_or_more(argument, rate):
    with pytest.raises(ConfigError, match=f"^{argument} is {rate!r}; a learning rate is a finite number of 0 or more$"):
        prefixkit.parameter_groups(classifier(), **{argument: rate})


def test_a_method_that_recommends_none_takes_a_rate():
    model = prefixkit.apply(tiny.make("llama"), LowRank.method, num_virtual_tokens=4)
    assert set(rates(model, lr=0.01).values()) == {0.01}
    with pytest.raises(MethodError):
        prefixkit.parameter_groups(model)


def test_a_rate_far_off_is_warned_of_where_it_was_given():
    with pytest.warns(UserWarning, match="^learning rate 0.1 is far from the 0.0005") as caught:
        prefixkit.parameter_groups(classifier(), lr=0.1)
    assert caught[0].filename == __file__
