"""A lab: N hosts and a switch, each a network namespace, joined by shaped links.

::

    namespace effadam-<id>-h0            namespace effadam-<id>-sw
    eth0 10.77.0.1 ──────── veth ──────── p0 ┐
                                             ├ bridge br0
    namespace effadam-<id>-h1                │
    eth0 10.77.0.2 ──────── veth ──────── p1 ┘

Every direction of every link is shaped where it leaves: ``eth0`` is the host's way up, ``p0`` its way
down. Where packets are to be late and the kernel has no netem, a process takes the cables' place, see
``delay.py``. Nothing is added to the machine's own namespace, so no packet can leave the lab and labs
cannot meet each other; all of them use the same addresses.

``<id>`` names the owner, a process, by pid and start time. A lab that has lost its owner is found by
that and taken down: by ``python -m benchmarks.netlab cleanup``, or by the next lab.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from . import delay
from .link import Link

__all__ = ["LabError", "NetLab", "cleanup", "leftovers"]

_NAME = re.compile(r"effadam-(\d+)-(\d+)-(\d+)-(sw|h\d+)")
_NETWORK = "10.77.0"
_FEWEST, _MOST = 2, 64
_numbers = itertools.count()


class LabError(RuntimeError):
    """The lab cannot be built here."""


class NetLab:
    """A lab, built on entering the context and taken down on leaving it, however that happens.

    Args:
        hosts: Number of hosts.
        link: What every host's link is like.

    Raises:
        LabError: On entering, if this process is not root or the kernel cannot do it.
        ValueError: If the number of hosts is out of range.

    Example:
        >>> with NetLab(4, Link.parse("1gbit")) as lab:
        ...     run_in_lab(lab, [sys.executable, "train.py"])
    """

    def __init__(self, hosts: int, link: Link) -> None:
        if not _FEWEST <= hosts <= _MOST:
            raise ValueError(f"Invalid hosts: {hosts}. Must be from {_FEWEST} to {_MOST}.")
        self.hosts = hosts
        self.link = link
        self.id = f"effadam-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        self._old_handlers: dict[signal.Signals, object] = {}
        self._line: subprocess.Popen[str] | None = None

    @property
    def switch(self) -> str:
        """Name of the switch's namespace."""
        return f"{self.id}-sw"

    def namespace(self, host: int) -> str:
        """Name of a host's namespace."""
        return f"{self.id}-h{host}"

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"{_NETWORK}.{host + 1}"

    def __enter__(self) -> NetLab:
        check_possible()
        cleanup()
        # A terminated process leaves its "with" blocks only if the signal becomes an exception.
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._old_handlers[number] = signal.signal(number, _leave)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the lab down, with every process in it."""
        # A second Ctrl-C must not stop the cleaning.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _remove([name for name in _namespaces() if name.startswith(f"{self.id}-")])
            if self._line is not None:
                delay.end_line(self._line)
                self._line = None
        finally:
            signal.signal(signal.SIGINT, interrupt)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._old_handlers.clear()

    def _build(self) -> None:
        names = [self.switch, *(self.namespace(host) for host in range(self.hosts))]
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge", "stp_state", "0")
        _run("ip", "-n", self.switch, "link", "set", "br0", "up")
        uses_line = self.link.delay_ms > 0 and not self._has_netem()
        if uses_line:
            self._start_line()
        for host in range(self.hosts):
            if not uses_line:
                self._join(host)
            self._plug_in(host)
            for namespace, device in ((self.namespace(host), "eth0"), (self.switch, f"p{host}")):
                for command in self.link.shaping(device, not uses_line):
                    _run("tc", "-n", namespace, *command)

    def check_line(self) -> None:
        """Check that packets are still carried.

        Raises:
            LabError: If they are late because of a process, and that has ended.
        """
        if self._line is not None and self._line.poll() is not None:
            raise LabError(
                f"The process that delays packets has ended: {delay.end_line(self._line)}. Nothing "
                "reaches another host any more; build the lab anew."
            )

    def _has_netem(self) -> bool:
        """Whether the kernel can delay packets by itself."""
        tc, netem = ("tc", "-n", self.switch, "qdisc"), ("dev", "lo", "root", "netem")
        if subprocess.run([*tc, "add", *netem], capture_output=True, check=False).returncode != 0:
            return False
        _run(*tc, "del", *netem)
        return True

    def _start_line(self) -> None:
        hosts = [self.namespace(host) for host in range(self.hosts)]
        try:
            self._line = delay.start_line(self.switch, hosts, self.link.delay_ms / 2e3)
        except OSError as error:
            raise LabError(
                "There is nothing to delay packets with: tc cannot add a netem (most often the kernel "
                f"has no sch_netem), and a process in its place failed: {error}. It needs the kernel's "
                "tun driver and /dev/net/tun."
            ) from error

    def _join(self, host: int) -> None:
        """Lay the cable."""
        # fmt: off
        _run("ip", "link", "add", "eth0", "netns", self.namespace(host), "type", "veth",
             "peer", "name", f"p{host}", "netns", self.switch)
        # fmt: on

    def _plug_in(self, host: int) -> None:
        namespace, port = self.namespace(host), f"p{host}"
        # fmt: off
        _run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        # On the route, because the setting for a whole namespace is not open to every root. Cubic is
        # what most machines run, whatever this one does.
        _run("ip", "-n", namespace, "route", "replace", f"{_NETWORK}.0/24", "dev", "eth0",
             "src", self.address(host), "congctl", "cubic")
        # fmt: on
        window = self.link.window_bytes
        settings = {
            "tcp_no_metrics_save": "1",  # no connection inherits what an earlier one met
            "tcp_slow_start_after_idle": str(int(not self.link.keeps_windows)),
            "tcp_rmem": f"4096 131072 {window}",
            "tcp_wmem": f"4096 65536 {window}",
        }
        for name, value in settings.items():
            _run("ip", "netns", "exec", namespace, "sysctl", "-qw", f"net.ipv4.{name}={value}")


def check_possible() -> None:
    """Check that this process can build a lab.

    Raises:
        LabError: If not, saying what is missing.
    """
    for tool in ("ip", "tc", "sysctl", "setpriv"):
        if shutil.which(tool) is None:
            raise LabError(
                f"The network lab needs the command {tool!r}, which is not on the PATH. It is part "
                "of the packages iproute2, procps and util-linux; the lab runs on Linux only."
            )
    if os.geteuid() != 0:
        raise LabError(
            f"The network lab needs root to make network namespaces; this process runs as user "
            f"{os.geteuid()}. Start it with sudo, or in a container with --privileged."
        )


def leftovers() -> list[str]:
    """Namespaces of labs whose owner is gone.

    Returns:
        Their names.
    """
    return [name for name in _namespaces() if not _owner_lives(name)]


def cleanup() -> list[str]:
    """Take down the labs whose owner is gone.

    Returns:
        The names of the namespaces that were removed.
    """
    names = leftovers()
    _remove(names)
    return names


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    if not folder.is_dir():
        folder = Path("/var/run/netns")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in names if _NAME.fullmatch(name))


def _owner_lives(name: str) -> bool:
    match = _NAME.fullmatch(name)
    assert match is not None
    return _start_time(int(match[1])) == int(match[2])


def _start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])


def _remove(names: Sequence[str]) -> None:
    for name in names:
        _kill_inside(name)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _kill_inside(name: str) -> None:
    """End the processes in a namespace, by their ids, and wait until they are gone."""
    for _ in range(50):
        found = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        pids = [int(pid) for pid in found.stdout.split()]
        # Those that have ended and only wait for their parent to notice.
        pids = [pid for pid in pids if not _is_zombie(pid)]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(
            f"{' '.join(command)!r} failed: {done.stderr.strip()}. The network lab needs root and a "
            "kernel with network namespaces, veth, bridge and sch_tbf."
        )
    return done.stdout
