"""A LoRA of PEFT and a prefix on one model: both train, each is saved in its own format."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import prefixkit

# PEFT asks the model under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM"}


def lora_first():
    model = tiny.make("llama")
    model.add_adapter(LoraConfig(**LORA))
    return prefixkit.apply(model, num_virtual_tokens=4)


def prefix_first():
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=4)
    model.add_adapter(LoraConfig(**LORA))
    assert not any(value.requires_grad for value in model.prefixkit.parameters())
    return prefixkit.unfreeze(model)


def inside_a_peft_model():
    model = tiny.make("llama")
    get_peft_model(model, LoraConfig(**LORA))
    return prefixkit.apply(model, num_virtual_tokens=4)


MAKERS = [lora_first, prefix_first, inside_a_peft_model]


def trained(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


def steps(model, count=2):
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    ids = tiny.tokens(2, 8)
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("make", MAKERS)
def test_both_train_and_nothing_else(make):
    model = make()
    before = {name: value.clone() for name, value in model.named_parameters()}
    names = trained(model)
    assert {name.split(".")[0] for name in names} == {"model", "prefixkit"}
    assert all("lora_" in name or name.startswith("prefixkit.") for name in names)
    assert len(names) == 1 + 2 * 2 * 3
    steps(model)
    assert {name for name, value in model.named_parameters() if not torch.equal(value, before[name])} == names


def test_each_has_a_learning_rate_of_its_own():
    model = lora_first()
    prefix, lora = prefixkit.parameter_groups(model, other_lr=1e-4)
    assert (prefix["lr"], lora["lr"]) == (0.1, 1e-4)
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(value)] for value in lora["params"]} == {name for name in trained(model) if "lora_" in name}
    assert len(prefix["params"]) == 1


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.tokens(2, 6)).logits


@pytest.mark.parametrize("make", [lora_first, prefix_first])
@pytest.mark.parametrize("order", ["lora", "prefix"])
def test_one_folder_holds_both(make, order, tmp_path):
    model = make()
    steps(model)
    model.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "prefix.safetensors", "prefix_config.json"} <= names
    again = tiny.make("llama")
    loads = {"lora": lambda: again.load_adapter(str(tmp_path)), "prefix": lambda: prefixkit.load(again, tmp_path)}
    for name in sorted(loads, key=lambda name: name != order):
        loads[name]()
    torch.testing.assert_close(logits(again), logits(model))


def test_a_peft_model_and_its_prefix_are_saved_apart(tmp_path):
    model = tiny.make("llama")
    wrapped = get_peft_model(model, LoraConfig(**LORA))
    prefixkit.apply(model, num_virtual_tokens=4)
    steps(wrapped)
    with pytest.raises(prefixkit.CheckpointError, match="^this model is inside a PeftModel"):
        model.save_pretrained(tmp_path / "no")
    wrapped.save_pretrained(tmp_path / "lora")
    prefixkit.save(model, tmp_path / "prefix")
    again = tiny.make("llama")
    both = PeftModel.from_pretrained(again, tmp_path / "lora")
    prefixkit.load(again, tmp_path / "prefix")
    torch.testing.assert_close(logits(both), logits(wrapped))


def test_disabled_and_removed_leave_the_lora():
    model = tiny.make("llama")
    model.add_adapter(LoraConfig(**LORA))
    steps(model)
    expected, trains = logits(model), trained(model)
    prefixkit.apply(model, num_virtual_tokens=4)
    with prefixkit.disabled(model):
        assert torch.equal(logits(model), expected)
    prefixkit.remove(model)
    assert torch.equal(logits(model), expected)
    assert trained(model) == trains


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = tiny.tokens(6, seed=index)
        return {"input_ids": ids, "labels": ids}


def test_a_trainer_resumes_both(tmp_path):
    def trainer(epochs, folder):
        torch.manual_seed(0)
        settings = TrainingArguments(
            output_dir=str(tmp_path / folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            save_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return Trainer(model=lora_first(), args=settings, train_dataset=Rows())

    whole = trainer(2, "whole")
    whole.train()
    half = trainer(1, "half")
    half.train()
    resumed = trainer(2, "half")
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name in trained(whole.model):
        torch.testing.assert_close(resumed.model.get_parameter(name), whole.model.get_parameter(name), msg=name)


def test_a_head_that_is_wrapped_later_is_named():
    """And nothing is half done."""
    model = BertForSequenceClassification(tiny.MAKERS["bert"]().config).eval()
    prefixkit.apply(model, num_virtual_tokens=4)
    model.add_adapter(LoraConfig(target_modules=["query", "classifier"]))
    ids = tiny.tokens(2, 6)
    before = model(ids).logits
    for act in (prefixkit.remove, prefixkit.unfreeze, lambda one: prefixkit.disabled(one).__enter__()):
        with pytest.raises(prefixkit.AttachmentError, match="^the head is not what it was when the prefix was applied"):
            act(model)
    assert torch.equal(model(ids).logits, before)
