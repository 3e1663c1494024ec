"""The prefix on several processes: replicated, sharded, and spread by tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefixkit
from prefixkit.errors import EngineError, UnsupportedModelError
from prefixkit.testing import jobs, workers
from prefixkit.testing.subject import NEW, TOKENS, Subject, loss_of
from prefixkit.testing.traits import needs


class Parallel:
    """Two gloo processes against one."""

    @needs("on_cpu")
    def test_replicas_give_the_gradients_of_one_process(self, subject: Subject, engine: str, method: str) -> None:
        """Under DDP, two processes give the gradients of one process on the whole batch."""
        with subject.may_refuse(engine):
            _same_gradients(subject, jobs.replicated_gradients, engine=engine, method=method)

    @needs("on_cpu")
    def test_shards_give_the_gradients_of_one_process(self, subject: Subject, engine: str, method: str) -> None:
        """Under FSDP2, two processes give the gradients of one process on the whole batch."""
        with subject.may_refuse(engine):
            _same_gradients(subject, jobs.sharded_gradients, engine=engine, method=method)

    @needs("checkpoints", "reachable", "on_cpu")
    @pytest.mark.parametrize("kind", ["replicated", "sharded"])
    def test_parallel_checkpointing(self, subject: Subject, kind: str) -> None:
        """DDP and FSDP2 with gradient checkpointing give the gradients of one process without."""
        job = {"replicated": jobs.replicated_gradients, "sharded": jobs.sharded_gradients}[kind]
        _same_gradients(subject, job, checkpointing=True)

    @needs("on_cpu")
    def test_sharded_model_saves_the_whole_prefix(self, subject: Subject, method: str, tmp_path: Path) -> None:
        """A prefix trained and saved under FSDP2 is, loaded by one process, the one that one process trains."""
        model = subject.with_prefix(method=method)
        inputs = subject.inputs(batch=4)
        found = workers.run(jobs.sharded_steps, model, inputs=inputs, folder=str(tmp_path))
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        loss_of(subject.outputs(model, **inputs)).backward()
        optimizer.step()
        expected = subject.logits(model, **inputs)
        bare = subject.logits(subject.bare(), **inputs)
        loaded = prefixkit.load(subject.bare(), tmp_path, adapter=subject.adapter)
        torch.testing.assert_close(subject.logits(loaded, **inputs), expected, atol=1e-4, rtol=1e-4)
        for trained, disabled in found:
            torch.testing.assert_close(trained, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(disabled, bare, atol=1e-4, rtol=1e-4)

    @needs("generates", "on_cpu")
    def test_sharded_model_generates(self, subject: Subject, engine: str) -> None:
        """Under FSDP2 generate() gives the tokens of one process."""
        model = subject.with_prefix(engine=engine)
        ids = subject.tokens(2, 7)
        with subject.may_refuse(engine):
            expected = subject.generate(model, ids)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            settings = {"max_new_tokens": NEW, "do_sample": False}
            for found in workers.run(jobs.sharded_generation, model, inputs=inputs, settings=settings):
                assert torch.equal(found, expected)

    @needs("on_cpu")
    def test_sharded_before_apply_is_refused(self, subject: Subject, engine: str) -> None:
        """A prefix on a model that FSDP2 has sharded already is a clear error."""
        _refuses_spread_model(subject, jobs.sharded_before, engine=engine)

    @needs("on_cpu")
    def test_tensor_parallel_before_apply_is_refused(self, subject: Subject, engine: str, tmp_path: Path) -> None:
        """A prefix on a model that tensor parallel has spread already is a clear error."""
        subject.bare().save_pretrained(tmp_path)
        _refuses_spread_model(subject, jobs.tensor_parallel_before, engine=engine, folder=str(tmp_path))

    @needs("on_cpu")
    def test_tensor_parallel_after_apply_is_refused(self, subject: Subject, engine: str) -> None:
        """Training a prefix on a model that tensor parallel has spread afterwards is a clear error."""
        model = subject.with_prefix(engine=engine, training=True)
        with pytest.raises(EngineError, match="tensor parallel") as caught:
            workers.run(jobs.tensor_parallel_after, model, inputs=subject.inputs())
        subject.refusals.append(str(caught.value))


def _refuses_spread_model(subject: Subject, job: jobs.Job, *, engine: str, **arguments: Any) -> None:
    model = subject.bare()
    options = {"num_virtual_tokens": TOKENS, "engine": engine, **subject.cacheable(engine), **arguments}
    with pytest.raises(UnsupportedModelError, match="spread over processes already") as caught:
        workers.run(job, model, stated=tuple(subject.adapter.stacks(model)), **options)
    subject.refusals.append(str(caught.value))


def _same_gradients(subject: Subject, job: jobs.Job, *, checkpointing: bool = False, **options: Any) -> None:
    """The gradients that ``job`` gives in each process against those of this process on the whole batch."""
    model = subject.with_prefix(training=True, **options)
    inputs = subject.inputs(batch=4)
    loss_of(subject.outputs(model, **inputs)).backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    for found in workers.run(job, model, inputs=inputs, checkpointing=checkpointing):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient is not None
            size = float(gradient.abs().max())
            assert size > 0, "no gradient to compare"
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * size, rtol=1e-3)
