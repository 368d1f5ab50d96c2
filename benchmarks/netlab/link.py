"""What a host's link to the switch is like, and the ``tc`` commands that make it so."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Link"]

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SLOWEST, _FASTEST = 1e6, 1e11
_LONGEST_DELAY_MS = 1000.0
_SEGMENT_BYTES = 65536
_MTU_BYTES = 1500
# Data centre switches buffer some milliseconds; enough that N senders to one port lose little.
_QUEUE_S = 0.05
_SMALLEST_QUEUE_BYTES = 1 << 20


@dataclass(frozen=True)
class Link:
    """A full-duplex link between a host and the switch.

    Attributes:
        rate: Bits per second, in each direction, Ethernet headers included.
        delay_ms: One-way delay between any two hosts, half of it added by each of the two links.
        keeps_windows: Whether TCP goes on as fast as before after a pause, and does not begin slowly
            again: ``net.ipv4.tcp_slow_start_after_idle`` is 0.
    """

    rate: float
    delay_ms: float = 0.0
    keeps_windows: bool = False

    def __post_init__(self) -> None:
        if not _SLOWEST <= self.rate <= _FASTEST:
            raise ValueError(
                f"Invalid rate: {self.rate:g} bit/s. Must be from {_SLOWEST:g} to {_FASTEST:g}."
            )
        if not 0 <= self.delay_ms <= _LONGEST_DELAY_MS:
            raise ValueError(
                f"Invalid delay_ms: {self.delay_ms}. Must be from 0 to {_LONGEST_DELAY_MS:g}."
            )

    @classmethod
    def parse(cls, rate: str, delay_ms: float = 0.0, keeps_windows: bool = False) -> Link:
        """A link from a rate as people write it.

        Args:
            rate: Such as ``"200mbit"`` or ``"2.5gbit"``.
            delay_ms: One-way delay between two hosts.
            keeps_windows: See :class:`Link`.

        Returns:
            The link.

        Raises:
            ValueError: If the rate is not understood.
        """
        match = re.fullmatch(r"([0-9.]+) ?([kmg]bit)(/s)?", rate.strip().lower())
        if match is None:
            raise ValueError(
                f"Invalid rate: {rate!r}. Must be a number and kbit, mbit or gbit, as in 200mbit."
            )
        return cls(float(match[1]) * _UNITS[match[2]], delay_ms, keeps_windows)

    @property
    def name(self) -> str:
        """The link as people write it."""
        unit, size = ("gbit", 1e9) if self.rate >= 1e9 else ("mbit", 1e6)
        delay = f"+{self.delay_ms:g}ms" if self.delay_ms else ""
        windows = "+windows" if self.keeps_windows else ""
        return f"{self.rate / size:g}{unit}{delay}{windows}"

    def seconds(self, wire_bytes: float) -> float:
        """How long the link is busy with some bytes.

        Args:
            wire_bytes: Bytes, headers included.

        Returns:
            Seconds.
        """
        return wire_bytes * 8 / self.rate

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait in front of the link before any are dropped."""
        in_flight = self.rate / 8 * 2 * self.delay_ms / 1000
        return int(max(_SMALLEST_QUEUE_BYTES, self.rate / 8 * _QUEUE_S + in_flight))

    @property
    def window_bytes(self) -> int:
        """Bytes that TCP may have under way: what fills the link twice, and no less than 4 MiB."""
        in_flight = self.rate / 8 * 2 * self.delay_ms / 1000
        return int(max(1 << 22, 2 * in_flight + self.queue_bytes))

    def shaping(self, device: str, delays: bool = True) -> list[list[str]]:
        """The ``tc`` commands that shape what leaves a device.

        The token bucket holds a little more than one segment of 64 KiB: such segments pass uncut, as
        they do in hosts whose network card cuts them, and ``tbf`` charges them for the headers that
        the cut adds. What may pass at once is worth 0.6 ms at 1 Gbit/s.

        Args:
            device: Name of the interface.
            delays: Whether the kernel is to add :attr:`delay_ms`, by netem.

        Returns:
            Arguments of ``tc``, one list a command.
        """
        burst = int(max(1.25 * _SEGMENT_BYTES, self.rate / 8 * 1e-4))
        bucket = ["tbf", "rate", f"{self.rate:.0f}bit", "burst", str(burst)]
        bucket += ["limit", str(self.queue_bytes + burst)]
        commands = [["qdisc", "add", "dev", device, "root", "handle", "1:", *bucket]]
        if self.delay_ms and delays:
            packets = 1000 + int(self.rate / 8 * self.delay_ms / 1000 / _MTU_BYTES)
            packets += self.queue_bytes // _MTU_BYTES
            delay = ["netem", "delay", f"{self.delay_ms / 2:g}ms", "limit", str(packets)]
            commands.append(
                ["qdisc", "add", "dev", device, "parent", "1:1", "handle", "2:", *delay]
            )
        return commands
