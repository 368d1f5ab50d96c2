"""Process that delays frames, for kernels without netem.

Without netem, each host and its port at the switch are tap interfaces instead of the two ends of a
virtual cable. This process reads the frames that one interface has sent through its token bucket, and
writes them to the other interface after the delay. Segments of up to 64 KiB remain whole, as on a
virtual cable, so the process handles only a few thousand frames per second::

    eth0 (token bucket) ──► read ── delay ── write ──► p0 ── bridge
    eth0 ◄── write ── delay ── read ◄── (token bucket) p0

The lab starts the process as ``delay.py NAMESPACE_OF_THE_SWITCH MICROSECONDS HOST...``. The process
prints ``ready`` and runs in the switch's namespace until the namespace is removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

__all__ = ["DIE_WITH_PARENT", "end_delay", "start_delay"]

# From linux/if_tun.h; the values of the requests hold on x86, Arm and RISC-V.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PACKET_INFO, _WITH_OFFLOADS = 0x0002, 0x1000, 0x4000
_OFFLOADS = 0x01 | 0x02 | 0x04  # checksums, and TCP segments larger than a packet, in IPv4 and IPv6
_NEWNET = 0x40000000
_MAX_FRAME = 65536 + 256
_READ_AT_ONCE = 32
_START_S = 20.0
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


def start_delay(switch: str, hosts: Sequence[str], delay_s: float) -> subprocess.Popen[str]:
    """Start the process that connects every host to the switch, and wait until the interfaces exist.

    Args:
        switch: Name of the switch's namespace, which receives the interfaces ``p0``, ``p1`` and so on.
        hosts: Names of the hosts' namespaces, each of which receives an ``eth0``.
        delay_s: Delay of a frame in seconds, from a host to the switch and vice versa.

    Returns:
        The process; it ends when this process ends.

    Raises:
        OSError: If the interfaces cannot be created, with the reason.
    """
    process = subprocess.Popen(
        [*DIE_WITH_PARENT, sys.executable, __file__, switch, str(round(delay_s * 1e6)), *hosts],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], _START_S)
        is_ready = bool(readable) and process.stdout.readline() == "ready\n"
    except BaseException:
        end_delay(process)
        raise
    if not is_ready:
        raise OSError(end_delay(process) or "it did not start in time")
    return process


def end_delay(process: subprocess.Popen[str]) -> str:
    """End the process.

    Args:
        process: The process that :func:`start_delay` returned.

    Returns:
        The last line of its error output; empty if there was none.
    """
    process.kill()
    _, errors = process.communicate()
    return errors.strip().rpartition("\n")[2]


class _Direction:
    """One direction of one link.

    Args:
        source: File of the tap that sends frames.
        target: File of the tap that receives them.
        delay_s: Delay of a frame in seconds.
    """

    def __init__(self, source: int, target: int, delay_s: float) -> None:
        self.source = source
        self._target = target
        self._delay_s = delay_s
        self._pending: deque[tuple[float, bytes]] = deque()

    @property
    def due_s(self) -> float:
        """Return the time at which the next frame is due."""
        return self._pending[0][0] if self._pending else float("inf")

    def take(self) -> None:
        """Read the frames that were sent."""
        due_s = time.monotonic() + self._delay_s
        try:
            for _ in range(_READ_AT_ONCE):
                self._pending.append((due_s, os.read(self.source, _MAX_FRAME)))
        except BlockingIOError:
            pass

    def deliver(self) -> None:
        """Write the frames that are due."""
        now_s = time.monotonic()
        while self._pending and self._pending[0][0] <= now_s:
            self._write(self._pending.popleft()[1])

    def _write(self, frame: bytes) -> None:
        try:
            os.write(self._target, frame)
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the interface is down
                raise


def _open_tap(namespace: str, device: str) -> int:
    """Create a tap interface in a namespace, and move this process to the namespace.

    Args:
        namespace: Name of the namespace.
        device: Name of the interface.

    Returns:
        File descriptor of the interface; closing it removes the interface.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        if libc.setns(file.fileno(), _NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _TAP | _NO_PACKET_INFO | _WITH_OFFLOADS
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    fcntl.ioctl(tap, _TUNSETOFFLOAD, _OFFLOADS)
    return tap


def _forward(directions: Sequence[_Direction]) -> None:
    """Forward frames until the process is killed."""
    by_source = {direction.source: direction for direction in directions}
    while True:
        wait_s = min(direction.due_s for direction in directions) - time.monotonic()
        ready, _, _ = select.select(
            by_source, [], [], None if wait_s == float("inf") else max(0.0, wait_s)
        )
        for source in ready:
            by_source[source].take()
        for direction in directions:
            direction.deliver()


def _main(switch: str, delay_us: str, *hosts: str) -> None:
    delay_s = int(delay_us) / 1e6
    ends = [_open_tap(host, "eth0") for host in hosts]
    # The switch last, as the process remains in its namespace and ends with it.
    ports = [_open_tap(switch, f"p{number}") for number in range(len(hosts))]
    directions = []
    for end, port in zip(ends, ports, strict=True):
        directions += [_Direction(end, port, delay_s), _Direction(port, end, delay_s)]
    print("ready", flush=True)
    _forward(directions)


if __name__ == "__main__":
    _main(*sys.argv[1:])
