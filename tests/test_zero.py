"""DeepSpeed's ZeRO-3, two gloo processes against one."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
import zero_jobs

import prefixkit
from prefixkit.testing import workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed: nox -s zero"),
]


@pytest.mark.parametrize("stays", [0, 100_000])
@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_two_processes_train_as_one(name, method, stays, tmp_path):
    model = tiny.make(name)
    width = sum(site.width for site in prefixkit.sites(model))
    prefixkit.apply(model, method=method, num_virtual_tokens=4, init=tiny.random_flat(width, 4))
    inputs = tiny.inputs(model, batch=4)
    found = workers.run(zero_jobs.train, model, inputs=inputs, folder=str(tmp_path), stays=stays)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=zero_jobs.RATE)
    model(**inputs).logits.sin().mean().backward()
    optimizer.step()
    logits = tiny.logits(model, **inputs)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for gradients, outputs, generated in found:
        assert gradients.keys() == trained.keys()
        for key, value in trained.items():
            torch.testing.assert_close(gradients[key], value.grad, atol=1e-5 * float(value.grad.abs().max()), rtol=1e-4)
        torch.testing.assert_close(outputs, logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(generated, tokens)
    loaded = prefixkit.load(tiny.make(name), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded, **inputs), logits, atol=1e-5, rtol=1e-5)
