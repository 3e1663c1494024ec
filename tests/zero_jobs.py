"""What two processes do under DeepSpeed's ZeRO-3, for test_zero.py."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import prefixkit

RATE = 0.1


def engine_of(model, stays):
    """The model in DeepSpeed's engine, with every weight in pieces that has more than ``stays`` numbers."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: PLC0415 - looks for accelerators when it is imported

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": stays},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def half(inputs):
    return {name: value.chunk(2)[dist.get_rank()] for name, value in inputs.items()}


def train(model, inputs, folder, stays):
    """Gradients of one step, outputs and tokens after it; the prefix is saved."""
    engine = engine_of(model, stays)
    from deepspeed.utils import safe_get_full_grad  # noqa: PLC0415 - as above

    loss = engine(**half(inputs)).logits.sin().mean()
    engine.backward(loss)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = {name: safe_get_full_grad(value).clone() for name, value in trained.items()}
    engine.step()
    prefixkit.save(model, folder)
    dist.barrier()
    engine.eval()
    with torch.no_grad():
        outputs = engine(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, synced_gpus=True)
    return gradients, outputs, tokens
