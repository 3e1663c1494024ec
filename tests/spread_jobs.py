"""What two processes do with a model that tensor parallel has spread, for test_tensor_parallel.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import prefixkit
from prefixkit.testing.jobs import _whole, spread_by_plan
from prefixkit.testing.subject import enable_checkpointing

COLUMNS, ROWS = "columns", "rows"


def by_hand(model, plan):
    """torch's own way: ``plan`` says of each kind of projection, by the end of its name, how it is spread."""
    styles = {COLUMNS: ColwiseParallel, ROWS: RowwiseParallel}
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    chosen = {name: styles[how]() for name in names for end, how in plan.items() if name.endswith(end)}
    parallelize_module(model, init_device_mesh("cpu", (2,)), chosen)
    for module in model.modules():
        if hasattr(module, "has_relative_attention_bias"):  # T5 makes a bias of zeros for so many heads
            module.n_heads //= 2


def with_prefixes(model, prefixes, watched=False):
    """The model with each of ``prefixes``, in a state in which all of them train."""
    for options in prefixes:
        torch.manual_seed(0)
        prefixkit.apply(model, **options, adapter=prefixkit.generic_adapter() if watched else None)
        prefixkit.unfreeze(model, options["name"])
    for name, value in model.named_parameters():  # a gate that is shut hides the prefix
        if value.requires_grad and name.endswith(".gate"):
            value.data.fill_(0.7)
    return model


def run(model, inputs, rows=None):
    """Outputs and gradients of one step."""
    if rows is None:
        outputs = model(**inputs).logits
    else:
        with prefixkit.rows(model, rows):
            outputs = model(**inputs).logits
    outputs.sin().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return outputs.detach(), {name: value for name, value in gradients.items() if value is not None}


def train(model, plan, first, prefixes, inputs, base=None, rows=None, checkpointing=False, folder=None, watched=False):
    """Spread and apply, in the order that ``first`` says, and do one step."""
    if base is not None:
        model = spread_by_plan(model, base)
    elif first == "spread":
        by_hand(model, plan)
    with_prefixes(model, prefixes, watched)
    if base is None and first == "apply":
        by_hand(model, plan)
    if checkpointing:
        enable_checkpointing(model.train())
    outputs, gradients = run(model, inputs, rows)
    if folder is not None:
        prefixkit.save(model, folder)
        dist.barrier()
    return outputs, {name: _whole(value).clone() for name, value in gradients.items()}


def ask_for_a_cache(model, plan, prefixes):
    """What a native cache of spread heads raises."""
    with_prefixes(model, prefixes)
    by_hand(model, plan)
    prefixkit.to_cache(model)
