"""Who is timed, and how: in turns, so that what else the machine does hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Values = dict[str, list[float]]


def nothing() -> None:
    """Before a run that needs no preparation."""


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: How tables call it.
        run: What is timed; it takes what ``before`` gives.
        before: What has to be done before each run, and is not timed.
    """

    name: str
    run: Callable[[Any], Any]
    before: Callable[[], Any] = nothing


@dataclass(frozen=True)
class Conditions:
    """How everything is measured.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        threads: Of torch.
        repeats: Runs of each contender that count.
        warmup: Runs of each before them.
    """

    device: str = "cpu"
    threads: int = 2
    repeats: int = 7
    warmup: int = 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the models' weights."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def seconds_on_cpu(contender: Contender) -> tuple[float, float]:
    """One run by the clock, and by the processor time of this process, which others on the machine do not change.

    Garbage is collected before, and not while it lasts.
    """
    given = contender.before()
    gc.collect()
    gc.disable()
    try:
        start, worked = time.perf_counter(), time.process_time()
        contender.run(given)
        return time.perf_counter() - start, time.process_time() - worked
    finally:
        gc.enable()


def seconds_on_cuda(contender: Contender) -> tuple[float, float]:
    """One run by two events in the stream of the device, and by the processor time that the host spends on it."""
    given = contender.before()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    worked = time.process_time()
    start.record()
    contender.run(given)
    end.record()
    worked = time.process_time() - worked
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, worked


def in_turns(contenders: Sequence[Contender], conditions: Conditions) -> tuple[Values, Values]:
    """Seconds and processor seconds of each contender's runs, a number for each round.

    The order within a round is moved by one each time.
    """
    clock = seconds_on_cuda if conditions.device == "cuda" else seconds_on_cpu
    values: Values = {contender.name: [] for contender in contenders}
    worked: Values = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.freeze()
    for number in range(-conditions.warmup, conditions.repeats):
        for contender in moved(contenders, number):
            seconds, work = clock(contender)
            if number >= 0:
                values[contender.name].append(round(seconds, 6))
                worked[contender.name].append(round(work, 6))
    gc.unfreeze()
    return values, worked


def moved(contenders: Sequence[Contender], number: int) -> Sequence[Contender]:
    """Another one first in each round."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def peaks_on_cuda(contenders: Sequence[Contender]) -> Values:
    """Bytes that one run of each adds at its peak to what the device holds."""
    values: Values = {}
    for contender in contenders:
        given = contender.before()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        contender.run(given)
        values[contender.name] = [torch.cuda.max_memory_allocated() - held]
    return values
