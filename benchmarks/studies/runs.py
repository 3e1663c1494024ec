"""One run: train an arm on a task with one learning rate and one seed, and score it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

import prefixkit
from benchmarks.studies.arms import Arm, budget
from benchmarks.studies.findings import RESULTS, Entry, results_of
from benchmarks.studies.tasks import TASKS, Row, Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how.

    Attributes:
        study: Its name.
        task: One of the tasks.
        arm: What the plot calls it.
        learning_rate: Peak of a cosine schedule with a warm-up over a twentieth of the steps.
        seed: Of the data's order, the head, the prefix and the dropout.
        rows: Training rows, the first ones after shuffling with the seed.
        steps: Updates; 0 scores the base.
        head_rate: Peak of the head that trains with a prefix, if it has one of its own.
    """

    study: str
    task: str
    arm: str
    learning_rate: float
    seed: int
    rows: int
    steps: int
    head_rate: float | None = None


def train(model: Any, task: Task, run: Run) -> float:
    """Train what trains in ``model`` with an untouched Trainer; the mean loss of the last tenth of the steps."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(run.seed))[: run.rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=task.batch,
            learning_rate=run.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, run.steps // 20),
            logging_steps=max(1, run.steps // 10),
            save_strategy="no",
            report_to=[],
            seed=run.seed,
            bf16=task.bf16 and knows_bfloat16(),
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        rows = [task.train[index] for index in order.tolist()]
        own = (None, None)
        if run.head_rate:
            groups = prefixkit.parameter_groups(model, lr=run.learning_rate, head_lr=run.head_rate)
            own = (torch.optim.AdamW(groups, weight_decay=0.0), None)
        trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=task.collate, optimizers=own)
        trainer.train()
        return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def knows_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 itself."""
    able = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], task: Task) -> float:
    """Over batches of ``rows``."""
    model.eval()
    losses = [float(model(**task.collate(list(rows[start : start + 64]))).loss) for start in range(0, len(rows), 64)]
    return sum(losses) / len(losses)


def carry_out(run: Run, arm: Arm) -> Entry:
    """The run's settings and what came of it."""
    task = TASKS[run.task]()
    set_seed(run.seed)
    model = arm(task.make())
    numbers = budget(model) if run.steps else 0
    start = time.perf_counter()
    last = train(model, task, run) if run.steps else math.nan
    seconds = time.perf_counter() - start
    loss = mean_loss(model, task.test, task)
    other = mean_loss(model, task.other, task) if task.other else math.nan
    # A model that has diverged may generate for ever, and says nothing.
    score = task.score(model) if math.isfinite(loss) else 0.0
    return {
        **asdict(run),
        "score": round(score, 3),
        "test_loss": _finite(loss),
        "train_loss": _finite(last),
        "other_loss": _finite(other),
        "trained_numbers": numbers,
        "bf16": task.bf16 and knows_bfloat16(),
        "seconds": round(seconds, 1),
    }


def _finite(loss: float) -> float | None:
    return round(loss, 4) if math.isfinite(loss) else None


def carry_out_all(planned: Iterable[tuple[Run, Arm]]) -> None:
    """All runs that have no result yet, each written down as it ends."""
    RESULTS.mkdir(exist_ok=True)
    for run, arm in planned:
        known = ({name: entry.get(name) for name in asdict(run)} for entry in results_of(run.study))
        if asdict(run) in known:
            continue
        entry = carry_out(run, arm)
        with (RESULTS / f"{run.study}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(
            f"{entry['arm']:<24} lr {entry['learning_rate']:<8g} seed {entry['seed']}  score {entry['score']:6.2f}  "
            f"test loss {entry['test_loss']}  {entry['trained_numbers']:,} numbers  {entry['seconds']:.0f} s",
            flush=True,
        )
