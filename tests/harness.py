"""Runs a test function on several ranks, each a real process, and never hangs.

A test that needs several ranks must start real processes: threads share an interpreter, and
simulated ranks share a process group. Real processes fail in ways that a test must survive: one
rank raises while the others wait for it for ever, all of them wait for each other, one is killed.
:func:`run_ranks` therefore watches the processes from outside. Whatever happens, it comes back
within its time limit, says what every rank did, and leaves neither a process nor a file.

Every call starts new processes. They are forked from a server that has imported torch once and
done nothing else, so that a call costs some tens of milliseconds and no rank can see what an
earlier test left behind.

The way of a call::

    run_ranks --> pickles fn and args, makes a folder, starts one process per rank        [1]
                      rank: arms its stack dump, joins the process group                   [2]
                      rank: runs fn, writes its result or its traceback to the folder      [3]
    run_ranks <-- waits for the ends; after a failure only a grace period longer           [4]
              --> asks the ranks that still run for their stacks, kills them, by pid       [5]
              --> returns the results, or raises with the report of every rank             [6]
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["Died", "RankError", "run_ranks"]

# What nearly every rank imports, and what takes long. DDP imports torch._dynamo, which takes as long
# as torch itself. What cannot be imported is left out.
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.nn.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "pytest",
    "hypothesis",
    "lightning_plugin",
]

_DEFAULT_ENV = {
    "OMP_NUM_THREADS": "1",  # ranks share few cores
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
}

_STACK_WAIT_S = 2.0
_OUTPUT_TAIL_CHARS = 4000


class RankError(RuntimeError):
    """A rank raised or died. The message reports on every rank, the first to fail first."""


@dataclass(frozen=True)
class Died:
    """Stands for the result of a rank that was allowed to die, and did.

    Attributes:
        exitcode: As in :mod:`multiprocessing`: minus the signal's number, or the exit status.
    """

    exitcode: int


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    backend: str | None = "gloo",
    fresh: bool = False,
    may_die: Collection[int] = (),
    grace: float = 5.0,
) -> list[Any]:
    """Runs ``fn(rank, world_size, *args)`` on every rank and returns the results by rank.

    Args:
        fn: A function at the top level of an importable module.
        world_size: Number of ranks, each a process of its own.
        *args: Passed to every rank by pickle, tensors by value.
        timeout: Seconds until the ranks that still run are killed.
        env: Environment variables of the ranks, besides the caller's. ``OMP_NUM_THREADS`` also sets
            torch's threads.
        backend: Backend of the default process group that ``fn`` finds initialised over a file in a
            temporary folder; None for no process group at all.
        fresh: Start new interpreters instead of forking one that has imported torch: for variables
            in ``env`` that torch or triton read when imported, and for what happens when an
            interpreter shuts down. Costs some seconds.
        may_die: Ranks whose death is no failure; their result is then a :class:`Died`.
        grace: Seconds that the others get to end by themselves once a rank has failed.

    Returns:
        What ``fn`` returned, by rank.

    Raises:
        RankError: A rank raised, or ended without a result.
        TimeoutError: Some ranks were still running after ``timeout``; the message has the stacks of
            all their threads.

    Example:
        >>> def total(rank, world_size, scale):
        ...     tensor = torch.tensor([scale * rank])
        ...     torch.distributed.all_reduce(tensor)
        ...     return tensor.item()
        >>> run_ranks(total, 3, 10)
        [30, 30, 30]
    """
    payload = _pickled(fn, args)
    context = _context(fresh)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        whole_env = {**os.environ, **_DEFAULT_ENV, **(env or {})}
        call = _Call(folder, payload, world_size, backend, whole_env, timeout)
        processes = [
            context.Process(target=_rank_main, args=(call, rank), name=f"rank{rank}")
            for rank in range(world_size)
        ]
        try:
            with _environment(_DEFAULT_ENV):  # the fork server must load OpenMP with one thread
                for process in processes:
                    process.start()  # [1]
            running = _wait(processes, call, may_die, grace)  # [4]
            stacks = _stacks(processes, running, folder)  # [5]
        finally:
            _kill(processes)
        outcomes = [
            _Outcome.read(call, rank, processes[rank].exitcode, stacks.get(rank))
            for rank in range(world_size)
        ]
    return _results(fn, outcomes, may_die, timeout)  # [6]


@dataclass(frozen=True)
class _Call:
    """Arguments of the processes of one call."""

    folder: Path
    payload: bytes
    world_size: int
    backend: str | None
    env: dict[str, str]
    timeout: float

    def path(self, rank: int, kind: str) -> Path:
        """Return the file of a rank's ``result``, ``error``, ``stack`` or ``output``."""
        return self.folder / f"rank{rank}.{kind}"


@dataclass(frozen=True)
class _Outcome:
    """Files that one rank left, read after its end.

    ``stack`` is None for a rank that ended by itself.
    """

    rank: int
    exitcode: int | None
    result: bytes | None
    error: str
    failed_at_ns: float
    crash: str
    stack: str | None
    output: str

    @classmethod
    def read(cls, call: _Call, rank: int, exitcode: int | None, stack: str | None) -> _Outcome:
        result, error = call.path(rank, "result"), call.path(rank, "error")
        return cls(
            rank=rank,
            exitcode=exitcode,
            result=result.read_bytes() if result.exists() else None,
            error=_text(error),
            failed_at_ns=error.stat().st_mtime_ns if error.exists() else float("inf"),
            crash=_text(call.path(rank, "stack")),
            stack=stack,
            output=_text(call.path(rank, "output")),
        )

    @property
    def was_killed(self) -> bool:
        return self.stack is not None

    @property
    def failed(self) -> bool:
        return self.was_killed or self.result is None or self.exitcode != 0

    def report(self) -> str:
        """Describe this rank's end for the error message."""
        rank = f"rank {self.rank}"
        if self.error:
            *_, last = self.error.strip().splitlines()
            text = f"{rank} raised {last}\n{self.error}"
        elif self.was_killed:
            done = "had returned, but was still running" if self.result else "was still running"
            text = f"{rank} {done}, and was killed. Its threads, each innermost call first:\n"
            text += self.stack or "(no stack: stopped, gone, or still starting)\n"
        elif self.failed:
            text = f"{rank} {_ending(self.exitcode)} without a result.\n{self.crash}"
        else:
            text = f"{rank} returned.\n"
        if self.output:
            text += f"Output of {rank}:\n{self.output[-_OUTPUT_TAIL_CHARS:]}"
        return text


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(
            f"Cannot send {fn!r} and its arguments to the ranks: {error}. fn must be at the top "
            "level of a module, and its arguments picklable."
        ) from error


def _context(fresh: bool) -> SpawnContext | ForkServerContext:
    if fresh:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _wait(
    processes: Sequence[BaseProcess], call: _Call, may_die: Collection[int], grace: float
) -> list[int]:
    """Waits until all ranks have ended or time is up; returns the ranks that still run."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    deadline = time.monotonic() + call.timeout
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            break
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            if processes[rank].exitcode != 0 and rank not in may_die:
                deadline = min(deadline, time.monotonic() + grace)
    return sorted(running.values())


def _stacks(processes: Sequence[BaseProcess], running: list[int], folder: Path) -> dict[int, str]:
    """The stacks of the ranks that still run, by rank; empty where a rank does not answer."""
    paths = {rank: folder / f"rank{rank}.stack" for rank in running}
    for rank, path in paths.items():
        # Before the file exists the signal has no handler yet, and would kill.
        if path.exists():
            _signal(processes[rank], signal.SIGUSR1)
    give_up = time.monotonic() + _STACK_WAIT_S
    stacks: dict[int, str] = {}
    while paths and time.monotonic() < give_up:
        time.sleep(0.05)
        seen = {rank: _text(path) for rank, path in paths.items()}
        if all(seen.values()) and seen == stacks:
            break
        stacks = seen
    return stacks


def _signal(process: BaseProcess, number: int) -> None:
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _kill(processes: Sequence[BaseProcess]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.kill()
    for process in started:
        process.join()


def _results(
    fn: Callable[..., Any], outcomes: list[_Outcome], may_die: Collection[int], timeout: float
) -> list[Any]:
    """The results by rank; raises if a rank failed."""
    failed = [o for o in outcomes if o.failed and not (o.rank in may_die and _died(o))]
    if not failed:
        for outcome in outcomes:
            if outcome.output:
                print(f"Output of rank {outcome.rank}:\n{outcome.output}", end="")
        return [
            Died(o.exitcode or 0) if o.result is None else pickle.loads(o.result) for o in outcomes
        ]
    # What may be the cause comes first: deaths, then errors by time, then those who only waited.
    failed.sort(key=lambda outcome: (outcome.was_killed, bool(outcome.error), outcome.failed_at_ns))
    others = [outcome for outcome in outcomes if outcome not in failed]
    reports = "\n".join(outcome.report() for outcome in failed + others)
    name = f"{fn.__module__}.{fn.__qualname__}"
    if all(outcome.was_killed for outcome in failed):
        ranks = ", ".join(str(outcome.rank) for outcome in failed)
        raise TimeoutError(f"{name}: not done after {timeout:g} s on ranks {ranks}.\n\n{reports}")
    raise RankError(f"{name}: {len(failed)} of {len(outcomes)} ranks failed.\n\n{reports}")


def _died(outcome: _Outcome) -> bool:
    return outcome.result is None and not outcome.error and not outcome.was_killed


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"exited with status {exitcode}"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank_main(call: _Call, rank: int) -> None:
    """The life of one rank."""
    _redirect_output(call.path(rank, "output"))
    _arm_stack_dump(call.path(rank, "stack"), call.timeout)  # [2]
    os.environ.clear()  # that of the fork server is as old as the server
    os.environ.update(call.env)
    try:
        fn, args = pickle.loads(call.payload)
        _set_up_torch(call, rank)
        result = pickle.dumps(fn(rank, call.world_size, *args))
        _write(call.path(rank, "result"), result)  # [3]
        _leave_process_group()
    except BaseException:
        _write(call.path(rank, "error"), traceback.format_exc().encode())
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing is left to wait for: a failed rank may have threads that never end.
        os._exit(1)


def _redirect_output(path: Path) -> None:
    """Sends all that the process prints, C libraries included, to a file."""
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _arm_stack_dump(path: Path, timeout: float) -> None:
    file = path.with_suffix(".arming").open("w")
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    # If the parent is killed before it can clean up, its ranks still come to an end.
    faulthandler.dump_traceback_later(timeout + 60.0, exit=True, file=file)
    path.with_suffix(".arming").rename(path)  # its existence says that the handler is there


def _set_up_torch(call: _Call, rank: int) -> None:
    import torch

    torch.set_num_threads(int(call.env["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    if call.backend is None:
        return
    if call.backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.distributed.init_process_group(
        call.backend,
        init_method=f"file://{call.folder / 'rendezvous'}",
        rank=rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout + 60.0),
    )
    # Without it, a rank that is done at once closes connections that others are still making.
    torch.distributed.barrier()


def _leave_process_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _write(path: Path, data: bytes) -> None:
    """Writes a file that is either complete or absent, even if the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)
