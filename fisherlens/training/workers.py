"""Runs in worker processes: started afresh (spawned), one run at a time each, stopped with their parent.

What goes to a worker goes through a pipe: the data as bytes, functions by their name. A worker looks into its pipe while it trains: it
stops where the parent asks for it, and where the parent is gone.
"""

from __future__ import annotations

import multiprocessing
import numbers
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from fisherlens.errors import FisherLensError, InputError, user_level
from fisherlens.training.base import Problem, check_count
from fisherlens.training.jobs import Counter, Done, Here, Job, perform
from fisherlens.training.loop import MakeOptimizer, Ticker
from fisherlens.training.states import pack, unpack

_GRACE = 10.0  # seconds that workers get to hand in what they have after Ctrl-C, and to end
_REPORT_EVERY = 0.1  # seconds between looks into the pipe while a worker trains
_NOT_SENT = (
    "{what} cannot be sent to a worker process: {error}. Worker processes import functions by name: use a function defined at the top "
    "level of a module (functools.partial of one is fine) in the place of a lambda or a function within a function, or workers=0."
)
_DIED = (
    "A worker process ended with exit code {code} {when}. What it printed above says why. Workers import the main script anew, so that "
    "a script has to call compare_optimizers under if __name__ == '__main__':, and functions of a notebook have to come from a module. "
    "Otherwise the memory may be short: use fewer workers, or workers=0."
)


def make_crew(problem: Problem, optimizers: Mapping[str, MakeOptimizer], workers: int, jobs: int) -> Here | Crew:
    """Who does the runs: this process for ``workers=0``, else at most one worker for each run."""
    if isinstance(workers, bool) or not isinstance(workers, numbers.Integral):
        raise TypeError(f"workers must be an int; got {type(workers).__name__} {workers!r}.")
    if workers == 0:
        return Here(problem, optimizers)
    return Crew(problem, optimizers, check_count(workers, "workers"), jobs)


class Crew:
    """Worker processes, each with its share of this process's threads.

    Parameters
    ----------
    problem, optimizers
        What is trained; checked here for whether it can be sent.
    workers
        How many processes. Each runs on ``max(1, torch.get_num_threads() // workers)`` threads.
    jobs
        The largest number of runs at a time; no more processes than that are started.
    """

    def __init__(self, problem: Problem, optimizers: Mapping[str, MakeOptimizer], workers: int, jobs: int):
        self.threads = max(1, torch.get_num_threads() // workers)
        self._count = min(workers, jobs)
        for label, entry in optimizers.items():
            _check_sendable(entry, f"Optimizer {label!r}")
        _check_sendable(problem.factory, f"The model factory of problem {problem.name!r}")
        _check_sendable(problem.likelihood, f"The likelihood of problem {problem.name!r}")
        self._setup = (_packed(problem), dict(optimizers), self.threads)
        self._processes: dict[Any, Any] = {}  # pipe -> process
        self._told: set[tuple[str, str]] = set()

    def __enter__(self) -> Crew:
        return self

    def _start(self) -> None:
        """Start the processes; all import at the same time."""
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True, name="fisherlens worker")
            process.start()
            theirs.close()
            self._processes[ours] = process
        for pipe in self._processes:
            self._send(pipe, self._setup)

    def __exit__(self, *error: object) -> None:
        for pipe in self._processes:
            pipe.close()  # a worker that waits, or trains, sees that and ends
        deadline = time.monotonic() + (_GRACE if error[:1] == (None,) else 0.5)
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.terminate()
                process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._processes = {}

    def run(self, jobs: Sequence[Job], done: Done, bar: Ticker) -> bool:
        """Do the runs, hand each to ``done`` when it is over, in any order; False where Ctrl-C ended it.

        After Ctrl-C runs under way hand in what they have; a second one gives them up.
        """
        if jobs and not self._processes:
            self._start()
        waiting, busy, idle = deque(jobs), {}, list(self._processes)
        stopped, deadline = False, float("inf")
        while (waiting and not stopped) or busy:
            try:
                while idle and waiting and not stopped:
                    pipe = idle.pop()
                    busy[pipe] = (waiting[0], Counter(bar))
                    self._send(pipe, waiting.popleft())
                for pipe in connection.wait(list(busy), timeout=1.0):
                    if self._hear(pipe, *busy[pipe], done):
                        del busy[pipe]
                        idle.append(pipe)
            except KeyboardInterrupt:
                if stopped:
                    raise
                stopped, deadline = True, time.monotonic() + _GRACE
                for pipe in busy:
                    self._send(pipe, "stop")
            if time.monotonic() > deadline:
                break
        return not stopped

    def _hear(self, pipe: Any, job: Job, counter: Counter, done: Done) -> bool:
        """Take one message of a worker; True where its run is over."""
        try:
            kind, content = pipe.recv()
        except (EOFError, OSError):
            raise self._dead(pipe, f"in the run of optimizer {job.label!r}, seed {job.seed}") from None
        if kind == "steps":
            counter.update(content)
            return False
        if kind == "error":
            error, text = content
            error.add_note(f"In a worker process:\n{text}")
            raise error
        run, heard = content
        for category, text in heard:
            if (category.__name__, text) not in self._told:
                self._told.add((category.__name__, text))
                warnings.warn(text, category, stacklevel=user_level())
        counter.finish(job.num_steps)
        done(job, run)
        return True

    def _send(self, pipe: Any, message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:
            raise self._dead(pipe, "before it began") from None

    def _dead(self, pipe: Any, when: str) -> FisherLensError:
        process = self._processes[pipe]
        process.join(_GRACE)
        return FisherLensError(_DIED.format(code=process.exitcode, when=when))


def _check_sendable(value: Any, what: str) -> None:
    try:
        ForkingPickler.dumps(value)
    except Exception as error:  # pickling raises many types
        raise InputError(_NOT_SENT.format(what=what, error=" ".join(str(error).split()))) from error


def _packed(problem: Problem) -> dict[str, Any]:
    """A problem without anything that could be shared with this process by accident."""
    halves = {half: [(*pack(part), str(part.device)) for part in getattr(problem, half)] for half in ("train", "test")}
    return halves | {"name": problem.name, "factory": problem.factory, "likelihood": problem.likelihood}


def _unpacked(packed: Mapping[str, Any]) -> Problem:
    train, test = (tuple(unpack(*parts).to(device) for *parts, device in packed[half]) for half in ("train", "test"))
    return Problem(packed["name"], "", packed["factory"], train, test, packed["likelihood"])


# --- in the worker --------------------------------------------------------------------------------------------------


class _Report:
    """Tells the parent of steps, and listens to it."""

    def __init__(self, pipe: Any):
        self.pipe, self.waiting, self.last = pipe, 0.0, time.monotonic()

    def update(self, n: float, /) -> None:
        self.waiting += n
        now = time.monotonic()
        if now - self.last < _REPORT_EVERY:
            return
        self.last = now
        try:
            if self.pipe.poll():
                self.pipe.recv()
                raise KeyboardInterrupt  # the parent said stop
            self.pipe.send(("steps", self.waiting))
        except (EOFError, OSError):
            raise SystemExit(1) from None  # the parent is gone
        self.waiting = 0.0


def _work(pipe: Any) -> None:
    """Do runs until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    try:
        packed, optimizers, threads = pipe.recv()
        torch.set_num_threads(threads)
        problem = _unpacked(packed)
        while True:
            job = pipe.recv()
            if isinstance(job, Job):  # a late "stop" means nothing any more
                pipe.send(_answer(job, problem, optimizers, pipe))
    except (EOFError, OSError):
        return


def _answer(job: Job, problem: Problem, optimizers: Mapping[str, MakeOptimizer], pipe: Any) -> tuple[str, Any]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = perform(job, problem, optimizers, _Report(pipe))
        heard = dict.fromkeys((entry.category, str(entry.message)) for entry in caught)
        return "run", (run, list(heard))
    except Exception as error:
        text = traceback.format_exc()
        try:
            ForkingPickler.dumps(error)
        except Exception:
            error = FisherLensError(f"{type(error).__name__}: {error}")
        return "error", (error, text)
