"""Run one program on all hosts of a lab, as a launcher does on a cluster."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from .delay import DIE_WITH_PARENT
from .lab import NetLab

__all__ = ["RankError", "run_in_lab"]

_FREE_PORT = "import socket as s; x = s.socket(); x.bind(('', 0)); print(x.getsockname()[1])"
_GRACE_S = 10.0
_SHOWN_LINES = 25


class RankError(RuntimeError):
    """A rank failed, or the ranks did not end before the timeout."""


def run_in_lab(
    lab: NetLab,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    quiet: bool = False,
) -> list[str]:
    """Run a program on every host, once for each of its ranks, and wait until all have ended.

    The environment contains the variables of torchrun: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
    ``LOCAL_WORLD_SIZE``, ``GROUP_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. It also contains
    ``GLOO_SOCKET_IFNAME`` and, for reading the counters, ``NETLAB_ID`` and ``NETLAB_HOSTS``. The
    programs are killed when this process ends.

    Args:
        lab: The lab, entered as a context manager.
        command: Program and arguments.
        env: Further environment variables.
        timeout_s: Seconds until the ranks are killed; None for no limit.
        quiet: Whether to suppress the output of the ranks, except in the message of an error.

    Returns:
        The output of each rank.

    Raises:
        RankError: If a rank fails or the timeout expires.
        LabError: If the lab fails.
    """
    probe = ["ip", "netns", "exec", lab.namespace(0), sys.executable, "-c", _FREE_PORT]
    port = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **(env or {}),
        "WORLD_SIZE": str(lab.hosts * lab.ranks_per_host),
        "LOCAL_WORLD_SIZE": str(lab.ranks_per_host),
        "MASTER_ADDR": lab.address(0),
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "eth0",
        "NETLAB_ID": lab.id,
        "NETLAB_HOSTS": str(lab.hosts),
    }
    ranks = [
        subprocess.Popen(
            [*DIE_WITH_PARENT, "ip", "netns", "exec", lab.namespace(host), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**shared, **_place(host, local, lab.ranks_per_host)},
        )
        for host in range(lab.hosts)
        for local in range(lab.ranks_per_host)
    ]
    try:
        return _watchdog(ranks, lab, timeout_s, quiet)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in ranks:
            rank.wait()


def _place(host: int, local: int, ranks_per_host: int) -> dict[str, str]:
    """Return the variables by which torchrun tells a process its place."""
    rank = str(host * ranks_per_host + local)
    return {"RANK": rank, "LOCAL_RANK": str(local), "GROUP_RANK": str(host)}


def _watchdog(
    ranks: Sequence[subprocess.Popen[bytes]], lab: NetLab, timeout_s: float | None, quiet: bool
) -> list[str]:
    printed = [bytearray() for _ in ranks]
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for index, rank in enumerate(ranks):
            assert rank.stdout is not None
            selector.register(rank.stdout, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select(timeout=0.2):
                data = os.read(key.fd, 1 << 16)
                printed[key.data] += data
                if not data:
                    selector.unregister(key.fileobj)
                elif not quiet and key.data == 0:
                    sys.stdout.write(data.decode(errors="replace"))
                    sys.stdout.flush()
            lab.check_delay()
            if any(rank.poll() not in (None, 0) for rank in ranks):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                break
    texts = [bytes(text).decode(errors="replace") for text in printed]
    ending = deadline > time.monotonic()
    codes = [_code(rank) if ending else rank.poll() for rank in ranks]
    if any(code != 0 for code in codes):
        raise RankError(_report(codes, texts, timeout_s))
    return texts


def _code(rank: subprocess.Popen[bytes]) -> int | None:
    try:
        return rank.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        return None


def _report(codes: Sequence[int | None], texts: Sequence[str], timeout_s: float | None) -> str:
    lines, shown = [], False
    for index, (code, text) in enumerate(zip(codes, texts, strict=True)):
        ending = f"ended with {code}" if code is not None else f"was killed after {timeout_s} s"
        lines.append(f"rank {index} {ending}")
        if code != 0 and not shown:
            shown = True  # others usually print the same error, or that this rank has ended
            lines += [f"  | {line}" for line in text.splitlines()[-_SHOWN_LINES:]]
    return "The ranks did not all succeed.\n" + "\n".join(lines)
