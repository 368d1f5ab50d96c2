"""The status board: the positions of all ranks, in the process group's store, after an alarm.

A rank *raises the alarm* by writing a value that has not been written before. Every rank that sees
a new value writes its own *position* and reads those of the others. No rank waits for another one
here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

from effadam_hook.exchange.collectives import DefaultStore
from effadam_hook.exchange.watchdog.deadlock import Process

__all__ = ["Entry", "Position", "StatusBoard"]

Entry = tuple[int, str, str, str]
"""A bucket that a rank has started: sequence number, label, kind of exchange, digest of its layout."""


@dataclass(frozen=True)
class Position:
    """The position of a rank.

    Attributes:
        started: Number of buckets that it has started.
        doing: The predicate of a sentence whose subject is the rank.
        left: Whether it has ended its training.
        failure: The error that it reports; None without one.
        kind: Class name of that error.
        history: The buckets that it has started last.
        process: The waits of all threads of its process.
        is_cause: Whether the error is more than the loss of a connection, which follows from
            another error.
    """

    started: int
    doing: str
    left: bool
    failure: str | None
    kind: str
    history: Sequence[Entry]
    process: Process | None = None
    is_cause: bool = False

    @property
    def is_final(self) -> bool:
        """Return whether the rank may write no further position."""
        return self.left or self.failure is not None


@dataclass
class _Peer:
    """The latest position of another rank, and the time of its arrival."""

    text: bytes = b""
    position: Position | None = None
    heard: float = 0.0


class StatusBoard:
    """One rank's view of the store.

    Args:
        rank: This rank in the group.
        size: Number of ranks.
        run_id: Run id of the model; keys in the store begin with it.
    """

    def __init__(self, rank: int, size: int, run_id: str) -> None:
        self._rank = rank
        self._store = DefaultStore(f"effadam/{run_id}")
        self._peers = {other: _Peer() for other in range(size) if other != rank}
        self._alarm = b""
        self._raised = 0
        self._published = 0

    def is_reachable(self) -> bool:
        """Return whether the store still exists."""
        return self._store.is_reachable()

    def raise_alarm(self) -> None:
        """Request the positions of all ranks."""
        self._raised += 1
        self._store.set("alarm", f"{self._rank} {self._raised}".encode())

    def hears_alarm(self) -> bool:
        """Return whether a rank has raised the alarm since the last call."""
        alarm = self._store.get("alarm")
        if alarm is None or alarm == self._alarm:
            return False
        self._alarm = alarm
        return True

    def publish(self, position: Position) -> None:
        """Write this rank's position; an unchanged one too, as proof that the rank is alive."""
        self._published += 1
        values = {field.name: getattr(position, field.name) for field in fields(position)}
        if position.process is not None:
            values["process"] = position.process.to_json()
        text = json.dumps({"published": self._published, **values})
        self._store.set(str(self._rank), text.encode())

    def read(self) -> None:
        """Read the positions that the other ranks have written."""
        for rank, peer in self._peers.items():
            text = self._store.get(str(rank))
            if text is not None and text != peer.text:
                values = json.loads(text)
                del values["published"]
                values["history"] = [tuple(entry) for entry in values["history"]]
                if values["process"] is not None:
                    values["process"] = Process.from_json(values["process"])
                peer.text, peer.position = text, Position(**values)
                peer.heard = time.monotonic()

    def positions(self) -> dict[int, Position]:
        """Return the positions of the other ranks, as far as they are known."""
        return {rank: peer.position for rank, peer in self._peers.items() if peer.position}

    def silent_since(self, moment: float) -> list[int]:
        """Return the ranks that have written nothing since a moment of :func:`time.monotonic`.

        Ranks that have reported a failure or the end of their training may be gone: not silent.
        """
        return [
            rank
            for rank, peer in self._peers.items()
            if peer.heard <= moment and not (peer.position and peer.position.is_final)
        ]
