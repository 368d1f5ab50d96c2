"""Lab of N hosts and a switch, each a network namespace, connected by shaped links.

::

    namespace effadam-<id>-h0            namespace effadam-<id>-sw
    eth0 10.77.0.1 ──────── veth ──────── p0 ┐
                                             ├ bridge br0
    namespace effadam-<id>-h1                │
    eth0 10.77.0.2 ──────── veth ──────── p1 ┘

Every direction of every link is shaped at its sender: ``eth0`` shapes the host's uplink, ``p0`` its
downlink. If a delay is required and the kernel has no netem, a process replaces the virtual cables, see
``delay.py``. The machine's own namespace remains unchanged, so no packet can leave the lab and several
labs cannot interfere. All labs use the same addresses.

``<id>`` identifies the owner, a process, by its pid and start time. ``python -m benchmarks.netlab
cleanup`` and the next lab remove every lab whose owner has ended.
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
_MIN_HOSTS, _MAX_HOSTS = 2, 64
_MAX_RANKS_PER_HOST = 64
_numbers = itertools.count()


class LabError(RuntimeError):
    """The lab cannot be built, or has failed."""


class NetLab:
    """Lab as a context manager: built on entry and removed on exit, also after errors and signals.

    Args:
        hosts: Number of hosts.
        link: Link of each host.
        ranks_per_host: Number of ranks that share each host's link, see :func:`run_in_lab`. They
            reach one another over the host's loopback interface, which is neither shaped nor counted.

    Raises:
        LabError: On entry, if this process is not root or the kernel lacks a feature.
        ValueError: If the number of hosts or of ranks is out of range.

    Example:
        >>> with NetLab(4, Link.parse("1gbit")) as lab:
        ...     run_in_lab(lab, [sys.executable, "train.py"])
    """

    def __init__(self, hosts: int, link: Link, ranks_per_host: int = 1) -> None:
        if not _MIN_HOSTS <= hosts <= _MAX_HOSTS:
            raise ValueError(f"Invalid hosts: {hosts}. Must be from {_MIN_HOSTS} to {_MAX_HOSTS}.")
        if not 1 <= ranks_per_host <= _MAX_RANKS_PER_HOST:
            raise ValueError(
                f"Invalid ranks_per_host: {ranks_per_host}. Must be from 1 to {_MAX_RANKS_PER_HOST}."
            )
        self.hosts = hosts
        self.link = link
        self.ranks_per_host = ranks_per_host
        self.id = f"effadam-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        self._old_handlers: dict[signal.Signals, object] = {}
        self._delay_process: subprocess.Popen[str] | None = None

    @property
    def shape(self) -> str:
        """Return hosts and ranks in words, for tables."""
        ranks = f" x {self.ranks_per_host} ranks" if self.ranks_per_host > 1 else ""
        return f"{self.hosts} hosts{ranks}"

    @property
    def switch(self) -> str:
        """Return the name of the switch's namespace."""
        return f"{self.id}-sw"

    def namespace(self, host: int) -> str:
        """Return the name of a host's namespace."""
        return f"{self.id}-h{host}"

    def address(self, host: int) -> str:
        """Return the IPv4 address of a host."""
        return f"{_NETWORK}.{host + 1}"

    def __enter__(self) -> NetLab:
        check_possible()
        cleanup()
        # A signal must become an exception, or the "with" block is not exited.
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
        """Remove the lab and end every process in it."""
        # A second Ctrl-C must not interrupt the cleanup.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _remove([name for name in _namespaces() if name.startswith(f"{self.id}-")])
            if self._delay_process is not None:
                delay.end_delay(self._delay_process)
                self._delay_process = None
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
        uses_process = self.link.delay_ms > 0 and not self._has_netem()
        if uses_process:
            self._start_delay()
        for host in range(self.hosts):
            if not uses_process:
                self._add_cable(host)
            self._configure_host(host)
            for namespace, device in ((self.namespace(host), "eth0"), (self.switch, f"p{host}")):
                for command in self.link.shaping(device, not uses_process):
                    _run("tc", "-n", namespace, *command)

    def check_delay(self) -> None:
        """Check that packets are still forwarded.

        Raises:
            LabError: If a process delays packets and has ended.
        """
        if self._delay_process is not None and self._delay_process.poll() is not None:
            raise LabError(
                "The process that delays packets has ended: "
                f"{delay.end_delay(self._delay_process)}. Packets no longer reach other hosts; build "
                "the lab again."
            )

    def _has_netem(self) -> bool:
        """Return whether the kernel can delay packets."""
        tc, netem = ("tc", "-n", self.switch, "qdisc"), ("dev", "lo", "root", "netem")
        if subprocess.run([*tc, "add", *netem], capture_output=True, check=False).returncode != 0:
            return False
        _run(*tc, "del", *netem)
        return True

    def _start_delay(self) -> None:
        hosts = [self.namespace(host) for host in range(self.hosts)]
        try:
            self._delay_process = delay.start_delay(self.switch, hosts, self.link.delay_ms / 2e3)
        except OSError as error:
            raise LabError(
                "Packets cannot be delayed: tc cannot add a netem (most often the kernel has no "
                f"sch_netem), and the process that replaces it failed: {error}. The process needs the "
                "kernel's tun driver and /dev/net/tun."
            ) from error

    def _add_cable(self, host: int) -> None:
        # fmt: off
        _run("ip", "link", "add", "eth0", "netns", self.namespace(host), "type", "veth",
             "peer", "name", f"p{host}", "netns", self.switch)
        # fmt: on

    def _configure_host(self, host: int) -> None:
        namespace, port = self.namespace(host), f"p{host}"
        # fmt: off
        _run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        # On the route, as not every root may change the setting of a namespace. Cubic is the default of
        # most machines.
        _run("ip", "-n", namespace, "route", "replace", f"{_NETWORK}.0/24", "dev", "eth0",
             "src", self.address(host), "congctl", "cubic")
        # fmt: on
        window = self.link.window_bytes
        settings = {
            "tcp_no_metrics_save": "1",  # connections start without metrics of earlier ones
            "tcp_slow_start_after_idle": str(int(not self.link.keeps_windows)),
            "tcp_rmem": f"4096 131072 {window}",
            "tcp_wmem": f"4096 65536 {window}",
        }
        for name, value in settings.items():
            _run("ip", "netns", "exec", namespace, "sysctl", "-qw", f"net.ipv4.{name}={value}")


def check_possible() -> None:
    """Check that this process can build a lab.

    Raises:
        LabError: If not, with the missing requirement.
    """
    for tool in ("ip", "tc", "sysctl", "setpriv"):
        if shutil.which(tool) is None:
            raise LabError(
                f"The network lab needs the command {tool!r}, which is not on the PATH. It is part "
                "of the packages iproute2, procps and util-linux; the lab runs on Linux only."
            )
    if os.geteuid() != 0:
        raise LabError(
            f"The network lab needs root to create network namespaces; this process runs as user "
            f"{os.geteuid()}. Start it with sudo, or in a container with --privileged."
        )


def leftovers() -> list[str]:
    """List the namespaces of labs whose owner has ended.

    Returns:
        The names of the namespaces.
    """
    return [name for name in _namespaces() if not _owner_lives(name)]


def cleanup() -> list[str]:
    """Remove the labs whose owner has ended.

    Returns:
        The names of the removed namespaces.
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
    """Return the start time of a process in clock ticks since boot; None if it does not exist."""
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
    """Kill the processes in a namespace by their ids, and wait until they have ended."""
    for _ in range(50):
        listed = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        pids = [int(pid) for pid in listed.stdout.split()]
        # Zombies have ended already; their parent has not collected them yet.
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
