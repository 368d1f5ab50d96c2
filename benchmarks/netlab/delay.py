"""A delay where the kernel has no netem: a process that holds every frame back for a while.

In place of the virtual cable, a host and its port at the switch are each a tap interface. What one
has sent, and its token bucket let pass, is read here and handed to the other when it is due. Segments
of up to 64 KiB stay whole, as in a virtual cable, so that a few thousand frames a second are all there
is to carry::

    eth0 (token bucket) ──► read ── held back ── write ──► p0 ── bridge
    eth0 ◄── write ── held back ── read ◄── (token bucket) p0

The process is started by the lab as ``delay.py NAMESPACE_OF_THE_SWITCH MICROSECONDS HOST...``, says
``ready``, and lives in the switch's namespace until that is taken down.
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

__all__ = ["DIE_WITH_PARENT", "end_line", "start_line"]

# linux/if_tun.h; the two requests are those of x86, Arm and RISC-V.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PACKET_INFO, _WITH_OFFLOADS = 0x0002, 0x1000, 0x4000
_OFFLOADS = 0x01 | 0x02 | 0x04  # checksums, and TCP segments larger than a packet, in IPv4 and IPv6
_NEWNET = 0x40000000
_LONGEST_FRAME = 65536 + 256
_READ_AT_ONCE = 32
_START_S = 20.0
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


def start_line(switch: str, hosts: Sequence[str], delay_s: float) -> subprocess.Popen[str]:
    """Start the process that joins every host to the switch, and wait until the interfaces are there.

    Args:
        switch: Name of the switch's namespace, which gets the interfaces ``p0``, ``p1`` and so on.
        hosts: Names of the hosts' namespaces, each of which gets an ``eth0``.
        delay_s: Seconds that a frame takes from a host to the switch, and back.

    Returns:
        The process; it ends with this one.

    Raises:
        OSError: If the interfaces cannot be made; the text says why.
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
        end_line(process)
        raise
    if not is_ready:
        raise OSError(end_line(process) or "it did not start in time")
    return process


def end_line(process: subprocess.Popen[str]) -> str:
    """End the process.

    Args:
        process: What :func:`start_line` returned.

    Returns:
        The last line of what went wrong in it, if anything did.
    """
    process.kill()
    _, errors = process.communicate()
    return errors.strip().rpartition("\n")[2]


class _Way:
    """One direction of one link.

    Args:
        source: File of the tap that frames leave.
        target: File of the one that gets them.
        delay_s: How long they take.
    """

    def __init__(self, source: int, target: int, delay_s: float) -> None:
        self.source = source
        self._target = target
        self._delay_s = delay_s
        self._held: deque[tuple[float, bytes]] = deque()

    @property
    def due_s(self) -> float:
        """When the next frame has to be handed over."""
        return self._held[0][0] if self._held else float("inf")

    def take(self) -> None:
        """Read what has been sent."""
        due_s = time.monotonic() + self._delay_s
        try:
            for _ in range(_READ_AT_ONCE):
                self._held.append((due_s, os.read(self.source, _LONGEST_FRAME)))
        except BlockingIOError:
            pass

    def hand_over(self) -> None:
        """Write what is due."""
        now_s = time.monotonic()
        while self._held and self._held[0][0] <= now_s:
            self._write(self._held.popleft()[1])

    def _write(self, frame: bytes) -> None:
        try:
            os.write(self._target, frame)
        except OSError as error:
            if error.errno != errno.EIO:  # which says that the interface is not up
                raise


def _open_tap(namespace: str, device: str) -> int:
    """Make a tap interface in a namespace, which this process then is in.

    Args:
        namespace: Its name.
        device: Name of the interface.

    Returns:
        The file from which the interface's frames are read; the interface goes when it is closed.
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


def _carry(ways: Sequence[_Way]) -> None:
    """Carry frames for ever."""
    by_source = {way.source: way for way in ways}
    while True:
        wait_s = min(way.due_s for way in ways) - time.monotonic()
        ready, _, _ = select.select(
            by_source, [], [], None if wait_s == float("inf") else max(0.0, wait_s)
        )
        for source in ready:
            by_source[source].take()
        for way in ways:
            way.hand_over()


def _main(switch: str, delay_us: str, *hosts: str) -> None:
    delay_s = int(delay_us) / 1e6
    ends = [_open_tap(host, "eth0") for host in hosts]
    # The switch last: the process stays there, and ends with it.
    ports = [_open_tap(switch, f"p{number}") for number in range(len(hosts))]
    ways = []
    for end, port in zip(ends, ports, strict=True):
        ways += [_Way(end, port, delay_s), _Way(port, end, delay_s)]
    print("ready", flush=True)
    _carry(ways)


if __name__ == "__main__":
    _main(*sys.argv[1:])
