"""Where ranks say what they are doing, when one of them asks: the process group's store.

A rank *raises the alarm* by writing a word that no one has written before. Every rank that sees a new
one writes its own *position*, and reads the others'. Nobody waits for anybody here.
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
"""A bucket that a rank has started: its place in the sequence, its label, what is done, its layout."""


@dataclass(frozen=True)
class Position:
    """What a rank says of itself.

    Attributes:
        sequence: How many buckets it has started.
        doing: What it is doing, for a sentence that begins with the rank.
        left: Whether it has ended its training.
        failure: What went wrong on it, if anything did.
        kind: Name of that error's class.
        history: The buckets that it started last.
        process: What all threads of its process wait for.
        is_cause: Whether the failure is no mere loss of a connection, which follows from another one.
    """

    sequence: int
    doing: str
    left: bool
    failure: str | None
    kind: str
    history: Sequence[Entry]
    process: Process | None = None
    is_cause: bool = False


@dataclass
class _Peer:
    """What is known of another rank."""

    text: bytes = b""
    position: Position | None = None
    heard: float = 0.0


class StatusBoard:
    """One rank's view of the store.

    Args:
        rank: This rank in the group.
        size: How many ranks there are.
        run_id: The same on all ranks, and no other board's: keys in the store begin with it.
    """

    def __init__(self, rank: int, size: int, run_id: str) -> None:
        self._rank = rank
        self._store = DefaultStore(f"effadam/{run_id}")
        self._peers = {other: _Peer() for other in range(size) if other != rank}
        self._alarm = b""
        self._raised = 0
        self._published = 0

    def is_reachable(self) -> bool:
        """Whether the store is still there."""
        return self._store.is_reachable()

    def raise_alarm(self) -> None:
        """Ask all ranks for their positions."""
        self._raised += 1
        self._store.set("alarm", f"{self._rank} {self._raised}".encode())

    def hears_alarm(self) -> bool:
        """Whether a rank has raised the alarm since this was asked last."""
        alarm = self._store.get("alarm")
        if alarm is None or alarm == self._alarm:
            return False
        self._alarm = alarm
        return True

    def publish(self, position: Position) -> None:
        """Write this rank's position, anew even if it is the same as before."""
        self._published += 1
        values = {field.name: getattr(position, field.name) for field in fields(position)}
        if position.process is not None:
            values["process"] = position.process.to_json()
        text = json.dumps({"published": self._published, **values})
        self._store.set(str(self._rank), text.encode())

    def read(self) -> None:
        """Read what the others have written."""
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
        """The other ranks' positions, as far as they are known."""
        return {rank: peer.position for rank, peer in self._peers.items() if peer.position}

    def silent_since(self, moment: float) -> list[int]:
        """The ranks that have written nothing since then, by :func:`time.monotonic`."""
        return [rank for rank, peer in self._peers.items() if peer.heard <= moment]
