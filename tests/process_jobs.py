"""What two processes do through accelerate and Trainer, for test_processes.py."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

import prefixkit

RATE = 0.1
STEPS = 2


def rows_of(ids):
    """Texts whose labels are themselves."""
    return [{"input_ids": row, "labels": row} for row in ids]


def optimizer_of(model):
    return torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=RATE)


def loop(model, ids, size, folder):
    """A loop of one's own as the documentation has it, with two batches to a step and an evaluation after it."""
    accelerator = Accelerator(cpu=True)
    batches = DataLoader(rows_of(ids), batch_size=size, collate_fn=default_data_collator)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer_of(model), batches)
    for number, batch in enumerate(batches):
        prepared.train()
        accelerator.backward(prepared(**batch).loss / 2)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
            prepared.eval()
            with torch.no_grad():
                prepared(**batch)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        prefixkit.save(model, folder)
    accelerator.wait_for_everyone()
    return accelerator.num_processes, tokens_of(accelerator.unwrap_model(prepared), ids)


def trainer(model, ids, size, folder):
    """Trainer, with an evaluation and a checkpoint after each step."""
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        use_cpu=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    rows = rows_of(ids)
    run = Trainer(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=rows[:4],
        optimizers=(optimizer_of(model), None),
    )
    run.train()
    return run.args.world_size, tokens_of(model, ids)


def tokens_of(model, ids):
    model.eval()
    return model.generate(ids[:2], attention_mask=torch.ones_like(ids[:2]), max_new_tokens=5, do_sample=False)


def sharded(model, ids, size, folder, ram_efficient):
    """The part of accelerate that shards with FSDP2. ``Accelerator(cpu=True)`` never gets there: it takes DDP."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=ram_efficient,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=None,
    )
    prepared = fsdp2_prepare_model(accelerator, model)
    assert type(prepared.model.layers[0]).__name__.startswith("FSDP")
    optimizer = optimizer_of(prepared)
    for start in range(0, len(ids), 2 * size):
        mine = ids[start : start + 2 * size].chunk(2)[dist.get_rank()]
        prepared.train()
        prepared(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prefixkit.save(prepared, folder)
    dist.barrier()
    register_fsdp_forward_method(prepared, "generate")
    return tokens_of(prepared, ids)


def unsharded(model, ids, size):
    """The same on one process."""
    optimizer = optimizer_of(model.train())
    for rows in ids.split(2 * size):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tokens_of(model, ids)
