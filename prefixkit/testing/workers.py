"""Two processes that talk through gloo, started once for all the tests of a run.

Models come to them by pickle, so every test here also shows that a model with its prefix can be
sent to a spawned process. A worker that hangs or dies is a clear failure, never a hang.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

import torch

from prefixkit.errors import PrefixkitError
from prefixkit.testing.jobs import PROCESSES, Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 120
"""How long a job may take, the start of the processes included."""
GRACE = 10
"""How long one process may go on after another has failed."""


class WorkerError(AssertionError):
    """A job failed in a worker, or never came back."""


@dataclass(frozen=True)
class Answer:
    """What one worker sends back: the job's result, or what it raised."""

    result: Any = None
    refusal: PrefixkitError | None = None
    failure: str | None = None


class Pair:
    """Two spawned processes of one gloo group."""

    def __init__(self) -> None:
        # At a port that is free; no file, which a killed run would leave behind.
        self.store: Any = _meeting_place(0)
        context = get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        for rank in range(PROCESSES):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.store.port), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, job: bytes) -> list[Answer]:
        """What each process answers to a pickled job; a process that hangs or dies raises."""
        for pipe in self.pipes:
            pipe.send_bytes(job)
        end = time.monotonic() + SECONDS
        answers: dict[int, Answer] = {}
        while len(answers) < PROCESSES:
            for rank, pipe in enumerate(self.pipes):
                if rank not in answers and pipe.poll(0.005):
                    answers[rank] = self._received(rank)
                    if answers[rank].failure or answers[rank].refusal:
                        end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                raise WorkerError(_described(answers) or f"no answer from a worker within {SECONDS} seconds")
        return [answers[rank] for rank in range(PROCESSES)]

    def close(self) -> None:
        """End both processes."""
        for process in self.processes:
            process.kill()
            process.join()

    def _received(self, rank: int) -> Answer:
        try:
            answer = pickle.loads(self.pipes[rank].recv_bytes())  # noqa: S301 - sent by our own process
        except (EOFError, ConnectionError) as error:
            self.processes[rank].join(GRACE)
            raise WorkerError(f"worker {rank} died with exit code {self.processes[rank].exitcode}") from error
        assert isinstance(answer, Answer)
        return answer


_pair: list[Pair] = []


def run(job: Job, model: PreTrainedModel, **arguments: Any) -> list[Any]:
    """Run ``job(model, **arguments)``, a function of :mod:`prefixkit.testing.jobs`, in both processes.

    Returns:
        The result of each process.

    Raises:
        WorkerError: With the traceback of the process in which it failed.
        PrefixkitError: That both processes raised.
    """
    message = _pickled(job, model, arguments)
    if not _pair:
        _pair.append(Pair())
    try:
        answers = _pair[0].run(message)
    except (WorkerError, OSError):
        close()
        raise
    refusals = [answer.refusal for answer in answers if answer.refusal]
    # Both refused: that is an answer, and neither waits for the other.
    if len(refusals) == PROCESSES:
        raise refusals[0]
    failures = _described(dict(enumerate(answers)))
    if failures:
        close()
        raise WorkerError(failures)
    return [answer.result for answer in answers]


def close() -> None:
    """End the processes; the next job starts new ones."""
    while _pair:
        _pair.pop().close()


atexit.register(close)


def _pickled(job: Job, model: PreTrainedModel, arguments: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps((job, pickle.dumps(model), arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise WorkerError(
            f"the model with its prefix cannot be pickled: {error}. A function in the adapter's stacks, such as "
            "RelativeBias(prefix_bias=...), has to be a function of a module, no lambda and no inner function"
        ) from error


def _described(answers: dict[int, Answer]) -> str:
    """The tracebacks of all that failed or refused."""
    parts = [(rank, answer.failure or answer.refusal) for rank, answer in answers.items()]
    return "\n".join(f"worker {rank}: {part!s}" for rank, part in parts if part)


def _meeting_place(port: int) -> Any:
    """Where the processes find each other: at port 0 a new one, else the one that is there."""
    place: Any = torch.distributed.TCPStore  # type: ignore[attr-defined]
    return place("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)


def _serve(pipe: Connection, rank: int, port: int) -> None:
    """A worker's life: join the group, and answer one job after the other."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns where it is not set
    if sys.platform == "linux":  # the host's own name may lead nowhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=_meeting_place(port), rank=rank, world_size=PROCESSES)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(pickle.dumps(_answer(message)))


def _answer(message: bytes) -> Answer:
    try:
        job, model, arguments = _unpickled(message)
        return Answer(result=job(model, **arguments))
    except PrefixkitError as error:
        return Answer(refusal=error)
    except Exception:  # noqa: BLE001 - whatever it is, the other process has to see it
        return Answer(failure=traceback.format_exc())


def _unpickled(message: bytes) -> tuple[Job, Any, dict[str, Any]]:
    job, model, arguments = pickle.loads(message)  # noqa: S301 - sent by our own process
    try:
        return job, pickle.loads(model), arguments  # noqa: S301 - the same
    except (ImportError, AttributeError) as error:
        raise WorkerError(
            f"the model with its prefix cannot be unpickled in a new process: {error}. Its class and the functions "
            "in the adapter's stacks, such as RelativeBias(prefix_bias=...), have to be those of a module that can "
            "be imported there, and a test module often cannot"
        ) from error
