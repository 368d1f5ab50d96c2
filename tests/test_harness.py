"""The multi-process harness: results by rank, errors and hangs reported, nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import Died, RankError, run_ranks

HANG_S = 600.0


@pytest.fixture(autouse=True, scope="module")
def _fork_server_runs() -> None:
    """It lives as long as pytest does, and so does its socket in the temporary folder."""
    run_ranks(describe, 1)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test of this file: none of its ranks lives, and no temporary file is left."""
    temporary, pids = tmp_path / "temporary", tmp_path / "pids"
    temporary.mkdir()
    pids.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TEST_PIDS", str(pids))
    yield
    assert list(temporary.iterdir()) == []
    assert [path.name for path in pids.iterdir() if is_alive(int(path.name))] == []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def note_pid(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()


def pids_of(folder: str) -> list[int]:
    return sorted(int(path.name) for path in Path(folder).iterdir())


@pytest.fixture
def pids() -> str:
    return os.environ["TEST_PIDS"]


def sum_ranks(rank: int, world_size: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + rank
    torch.distributed.all_reduce(total)
    return rank, total


def test_results_come_back_by_rank() -> None:
    results = run_ranks(sum_ranks, 3, torch.tensor([10.0, 20.0]))
    assert [rank for rank, _ in results] == [0, 1, 2]
    for _, total in results:
        assert total.tolist() == [33.0, 63.0]


def describe(rank: int, world_size: int) -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "initialised": torch.distributed.is_initialized(),
        "random": torch.rand(()).item(),
        "flavour": os.environ.get("FLAVOUR"),
        "inherited": os.environ.get("TEST_PIDS"),
        "preloaded": "torch._dynamo" in sys.modules,
    }


def test_every_call_starts_new_processes() -> None:
    first, second = run_ranks(describe, 2), run_ranks(describe, 2)
    assert len({result["pid"] for result in first + second} | {os.getpid()}) == 5


def test_ranks_start_alike_and_single_threaded() -> None:
    first, second = run_ranks(describe, 2)
    assert first["threads"] == second["threads"] == 1
    assert first["random"] == second["random"]
    assert first["initialised"]


def test_environment_reaches_the_ranks_and_only_them(pids: str) -> None:
    (result,) = run_ranks(describe, 1, env={"FLAVOUR": "sour", "OMP_NUM_THREADS": "2"})
    assert result["flavour"] == "sour"
    assert result["inherited"] == pids
    assert result["threads"] == 2
    assert "FLAVOUR" not in os.environ


def test_without_backend_there_is_no_process_group() -> None:
    assert [result["initialised"] for result in run_ranks(describe, 2, backend=None)] == [False] * 2


@pytest.mark.parametrize("fresh", [False, True])
def test_fresh_interpreters_start_without_torch(fresh: bool) -> None:
    (result,) = run_ranks(describe, 1, fresh=fresh, env={"FLAVOUR": "sweet"})
    assert result["preloaded"] is not fresh
    assert result["flavour"] == "sweet"
    assert result["initialised"]


def nested() -> object:
    def local(rank: int, world_size: int) -> None:
        return None

    return local


def test_a_local_function_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match="must be at the top level of a module"):
        run_ranks(nested(), 2)  # type: ignore[arg-type]


def one_raises(rank: int, world_size: int, folder: str) -> None:
    note_pid(folder)
    print(f"rank {rank} was here")
    if rank == 1:
        raise ValueError("the bucket has a hole")
    torch.distributed.barrier()


def test_an_exception_names_rank_and_line_and_comes_first(pids: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(one_raises, 3, pids)
    message = str(caught.value)
    assert "rank 1 raised ValueError: the bucket has a hole" in message
    assert 'raise ValueError("the bucket has a hole")' in message
    assert message.index("rank 1 raised") < message.index("rank 0")
    assert "Output of rank 2:\nrank 2 was here" in message
    assert len(pids_of(pids)) == 3


def one_raises_others_sleep(rank: int, world_size: int, folder: str) -> None:
    note_pid(folder)
    if rank == 0:
        raise ValueError("alone")
    time.sleep(HANG_S)


def test_after_a_failure_the_others_get_only_the_grace_period(pids: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 raised ValueError: alone") as caught:
        run_ranks(one_raises_others_sleep, 2, pids, grace=0.5)
    assert time.monotonic() - start < 20
    assert "rank 1 was still running, and was killed" in str(caught.value)
    assert "in one_raises_others_sleep" in str(caught.value)


def unpicklable(rank: int, world_size: int) -> object:
    return threading.Lock()


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank() -> None:
    with pytest.raises(RankError, match="rank 0 raised TypeError: cannot pickle"):
        run_ranks(unpicklable, 1)


def wait_for_each_other(rank: int, world_size: int, folder: str) -> None:
    note_pid(folder)
    helper = threading.Thread(target=helper_waits, daemon=True)
    helper.start()
    if rank == 0:
        time.sleep(HANG_S)
    torch.distributed.all_reduce(torch.zeros(1))


def helper_waits() -> None:
    threading.Event().wait()


def test_a_hang_is_a_timeout_with_the_stacks_of_all_threads_of_all_ranks(pids: str) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 3 s on ranks 0, 1, 2") as caught:
        run_ranks(wait_for_each_other, 3, pids, timeout=3)
    assert time.monotonic() - start < 30
    reports = str(caught.value).split("was still running, and was killed.")[1:]
    assert len(reports) == 3
    for report in reports:
        assert "in wait_for_each_other" in report
        assert "in helper_waits" in report
    assert "in all_reduce" in reports[1]
    assert len(pids_of(pids)) == 3


def stop_itself(rank: int, world_size: int, folder: str) -> None:
    note_pid(folder)
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_killed_too(pids: str) -> None:
    with pytest.raises(TimeoutError, match="no stack: stopped"):
        run_ranks(stop_itself, 1, pids, timeout=2)


def leave_a_thread(rank: int, world_size: int) -> str:
    threading.Thread(target=time.sleep, args=(HANG_S,)).start()
    return "done"


def test_a_rank_that_returns_but_never_ends_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match="rank 0 had returned, but was still running"):
        run_ranks(leave_a_thread, 1, timeout=2)


def die(rank: int, world_size: int, how: str, then: str = "return") -> str:
    if rank == 1:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), getattr(signal, how))
    if then == "wait":
        torch.distributed.barrier()
    return "survived"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGKILL", "rank 1 was killed by SIGKILL without a result"),
        ("SIGSEGV", "Fatal Python error: Segmentation fault"),
        ("exit", "rank 1 exited with status 3 without a result"),
    ],
)
def test_a_death_is_reported(how: str, said: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(die, 2, how)
    assert said in str(caught.value)


def test_a_death_is_reported_before_the_errors_that_it_caused() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(die, 3, "SIGKILL", "wait")
    message = str(caught.value)
    assert message.index("rank 1 was killed by SIGKILL") < message.index("rank 0 raised")


def test_a_death_that_is_allowed_is_a_result() -> None:
    assert run_ranks(die, 2, "SIGKILL", may_die={1}) == ["survived", Died(-signal.SIGKILL)]


def test_ctrl_c_leaves_nothing_behind(pids: str) -> None:
    def press_ctrl_c() -> None:
        while len(pids_of(pids)) < 2:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    start = time.monotonic()
    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        run_ranks(wait_for_each_other, 2, pids)
    presser.join()
    assert time.monotonic() - start < 20


def use_a_child_process(rank: int, world_size: int) -> list[int]:
    data = torch.utils.data.TensorDataset(torch.arange(4))
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)
    return [int(item) for (item,) in loader]


def test_a_rank_may_have_child_processes() -> None:
    assert run_ranks(use_a_child_process, 1) == [[0, 1, 2, 3]]
