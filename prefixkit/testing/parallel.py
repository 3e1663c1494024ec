"""The prefix on several processes: replicated, sharded, and spread by tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prefixkit
from prefixkit.errors import UnsupportedModelError
from prefixkit.testing import jobs, workers
from prefixkit.testing.subject import NEW, TOKENS, Subject, loss_of
from prefixkit.testing.traits import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        model = subject.bare()
        options = {"num_virtual_tokens": TOKENS, "engine": engine, **subject.cacheable(engine)}
        with pytest.raises(UnsupportedModelError, match="then shard") as caught:
            workers.run(jobs.sharded_before, model, stated=tuple(subject.adapter.stacks(model)), **options)
        subject.refusals.append(str(caught.value))

    @needs("on_cpu", "spreads")
    def test_spread_heads_train_as_on_one_process(
        self, subject: Subject, engine: str, method: str, tmp_path: Path
    ) -> None:
        """Under the model's own tensor-parallel plan a prefix has the outputs, gradients and files of one process."""
        model = subject.with_prefix(engine=engine, method=method, training=True)
        inputs, saved = subject.inputs(), _saved(subject, model, tmp_path)
        with subject.may_refuse(engine):
            found = workers.run(jobs.spread_training, subject.bare(training=True), saved=saved, inputs=inputs)
            trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
            optimizer = torch.optim.SGD(trained.values(), lr=0.1)
            outputs = subject.outputs(model, **inputs)
            loss_of(outputs).backward()
            optimizer.step()
            after = subject.logits(model, **inputs)
            loaded = prefixkit.load(subject.bare(training=True), saved.prefix, adapter=subject.adapter)
            torch.testing.assert_close(subject.logits(loaded, **inputs), after, atol=1e-4, rtol=1e-4)
            for before, gradients, stepped in found:
                torch.testing.assert_close(before, outputs, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(stepped, after, atol=1e-4, rtol=1e-4)
                _assert_same_gradients(gradients, {name: value.grad for name, value in trained.items()})

    @needs("generates", "on_cpu", "spreads")
    def test_spread_heads_generate(self, subject: Subject, engine: str, tmp_path: Path) -> None:
        """Under the model's own tensor-parallel plan generate() gives the tokens of one process."""
        model = subject.with_prefix(engine=engine)
        ids = subject.tokens(2, 7)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings = {"max_new_tokens": NEW, "do_sample": False}
        saved = _saved(subject, model, tmp_path)
        with subject.may_refuse(engine):
            expected = subject.generate(model, ids)
            for found in workers.run(
                jobs.spread_generation, subject.bare(), saved=saved, inputs=inputs, settings=settings
            ):
                assert torch.equal(found, expected)

    @needs("on_cpu", "spreads", "reachable")
    def test_spread_heads_start_alike(self, subject: Subject, tmp_path: Path) -> None:
        """On a model that is spread already, a prefix starts with the same numbers on every process."""
        model = subject.bare()
        folder = tmp_path / "base"
        model.save_pretrained(folder)
        text = prefixkit.TextInit(subject.tokens(TOKENS))
        options = {"num_virtual_tokens": TOKENS, "engine": "attention", "base": str(folder)}
        stated = tuple(subject.adapter.stacks(model))
        one, other = workers.run(jobs.spread_start, model, stated=stated, **options)
        assert all(torch.equal(one[name], other[name]) for name in one)
        expected = subject.flat_of(subject.with_prefix(init=text))
        for found in workers.run(jobs.spread_start, model, stated=stated, init=text, **options):
            (flat,) = found.values()
            torch.testing.assert_close(flat, expected.detach(), atol=1e-4, rtol=1e-4)


def _saved(subject: Subject, model: PreTrainedModel, folder: Path) -> jobs.Saved:
    bare = subject.bare()
    bare.save_pretrained(folder / "base")
    prefixkit.save(model, folder / "prefix")
    return jobs.Saved(tuple(subject.adapter.stacks(bare)), str(folder / "base"), str(folder / "prefix"))


def _same_gradients(subject: Subject, job: jobs.Job, *, checkpointing: bool = False, **options: Any) -> None:
    """The gradients that ``job`` gives in each process against those of this process on the whole batch."""
    model = subject.with_prefix(training=True, **options)
    inputs = subject.inputs(batch=4)
    loss_of(subject.outputs(model, **inputs)).backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    for found in workers.run(job, model, inputs=inputs, checkpointing=checkpointing):
        _assert_same_gradients(found, expected)


def _assert_same_gradients(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        size = float(gradient.abs().max())
        assert size > 0, "no gradient to compare"
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * size, rtol=1e-3)
