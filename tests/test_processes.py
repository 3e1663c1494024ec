"""DDP through accelerate and Trainer, two gloo processes against one: training, saving, generating.

And FSDP2 as accelerate shards a model. The conformance kit has the gradients, for every adapter.
"""

from __future__ import annotations

import process_jobs
import pytest
import tiny
import torch

import prefixkit
from prefixkit.testing import workers
from prefixkit.testing.with_trainer import trainer_pins_memory


def with_prefix(name, method):
    model = tiny.make(name)
    model.generation_config.eos_token_id = None
    width = sum(site.width for site in prefixkit.sites(model))
    return prefixkit.apply(model, method=method, num_virtual_tokens=4, init=tiny.random_flat(width, 4))


@trainer_pins_memory
@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("way", ["loop", "trainer"])
def test_two_processes_end_where_one_does(way, name, method, tmp_path):
    model, ids = with_prefix(name, method), tiny.tokens(16, 6)
    job = getattr(process_jobs, way)
    found = workers.run(job, model, ids=ids, size=2, folder=str(tmp_path / "two"))
    _, expected = job(model, ids, 4, str(tmp_path / "one"))
    bare = process_jobs.tokens_of(tiny.make(name), ids)
    assert not torch.equal(expected, bare)
    for processes, tokens in found:
        assert processes == 2
        assert torch.equal(tokens, expected)
    where = f"two/checkpoint-{process_jobs.STEPS}" if way == "trainer" else "two"
    loaded = prefixkit.load(tiny.make(name), tmp_path / where)
    torch.testing.assert_close(
        tiny.logits(loaded, **tiny.inputs(model)), tiny.logits(model, **tiny.inputs(model)), atol=1e-5, rtol=1e-5
    )
    start = tiny.logits(with_prefix(name, method).eval(), **tiny.inputs(model))
    assert not torch.allclose(tiny.logits(model, **tiny.inputs(model)), start, atol=1e-3), "nothing was trained"


@pytest.mark.parametrize("ram_efficient", [False, True])
def test_what_accelerate_shards_trains_saves_and_generates(ram_efficient, tmp_path):
    model, ids = with_prefix("llama", "prefix-tuning"), tiny.tokens(8, 6)
    options = {"folder": str(tmp_path), "ram_efficient": ram_efficient}
    found = workers.run(process_jobs.sharded, model, ids=ids, size=2, **options)
    expected = process_jobs.unsharded(model, ids, 2)
    assert all(torch.equal(tokens, expected) for tokens in found)
    loaded = prefixkit.load(tiny.make("llama"), tmp_path)
    torch.testing.assert_close(
        tiny.logits(loaded, **tiny.inputs(model)), tiny.logits(model, **tiny.inputs(model)), atol=1e-4, rtol=1e-4
    )
