"""The record of the buckets in flight, and the stop of an exchange: the first error counts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.futures import Future

from effadam_hook.errors import DisagreementError, EffAdamError
from effadam_hook.exchange.watchdog.deadlock import Process
from effadam_hook.exchange.watchdog.diagnosis import CONNECT_S, overdue
from effadam_hook.exchange.watchdog.flight_record import FlightRecord
from effadam_hook.exchange.watchdog.inflight import CONNECTING, Hold, InflightBucket
from effadam_hook.exchange.watchdog.monitor import Monitor
from effadam_hook.exchange.watchdog.stopping import Stopping


def start(record: FlightRecord, label: str, in_backward: bool = False) -> InflightBucket:
    inflight = record.new_bucket(
        label, "encode", Future(), torch.ones(1), in_backward, lambda: True
    )
    record.start(inflight, "a compressed exchange", "aa")
    return inflight


def test_a_bucket_is_in_flight_until_its_future_is_complete() -> None:
    record = FlightRecord("run", "model 1")
    record.wait_until_empty()
    first, second = start(record, "bucket 0"), start(record, "bucket 1")
    assert record.started == 2 and record.oldest is first
    assert [entry[:2] for entry in record.history] == [(0, "bucket 0"), (1, "bucket 1")]
    first.succeed()
    assert record.oldest is second and first.is_over
    waiting = threading.Thread(target=record.wait_until_empty)
    waiting.start()
    second.fail(EffAdamError("it broke."))
    waiting.join(timeout=5)
    assert not waiting.is_alive() and record.in_flight == {}
    with pytest.raises(EffAdamError, match="it broke"):
        second.future.value()


def test_a_bucket_completes_once_and_within_a_backward_without_an_error() -> None:
    record = FlightRecord("run", "model 1")
    inflight = start(record, "bucket 0", in_backward=True)
    inflight.fail(EffAdamError("it broke."))
    inflight.succeed()
    assert torch.equal(inflight.future.value(), torch.ones(1))


def test_a_hold_within_a_hold_ends_first() -> None:
    record = FlightRecord("run", "model 1")
    with record.holding("opening the exchange", "comparing steps") as outer:
        with record.holding("full_state_dict()", "gathering") as inner:
            assert record.oldest is inner and inner.number == 1
        assert record.hold is outer
    assert record.hold is None and record.holds == 2


def test_the_first_error_stops_the_exchange_and_fails_the_buckets_in_flight() -> None:
    record = FlightRecord("run", "model 1")
    stopping = Stopping(record)
    actions: list[str] = []
    stopping.on_failure(lambda: actions.append("failure"))
    stopping.on_close(lambda: actions.append("close"))
    inflight = start(record, "bucket 0")
    stopping.check()
    assert stopping.begin(DisagreementError("first."))
    assert not stopping.begin(EffAdamError("second."))
    stopping.complete()
    with pytest.raises(DisagreementError, match="first"):
        inflight.future.value()
    refused = stopping.refuse("Rank 0, bucket 1")
    assert isinstance(refused, DisagreementError)
    assert str(refused).startswith(
        "Rank 0, bucket 1: not started, the exchange has stopped: first."
    )
    with pytest.raises(DisagreementError, match="not started"):
        stopping.check()
    assert stopping.begin_closing() and not stopping.begin_closing()
    stopping.close()
    assert actions == ["failure", "close"] and not stopping.is_running


def test_a_close_with_buckets_in_flight_counts_as_a_failure_for_their_groups() -> None:
    record = FlightRecord("run", "model 1")
    stopping = Stopping(record)
    actions: list[str] = []
    stopping.on_failure(lambda: actions.append("failure"))
    start(record, "bucket 0")
    stopping.begin_closing()
    stopping.close()
    assert actions == ["failure"]
    assert "it was closed" in str(stopping.refuse("Rank 0, bucket 1"))


def test_a_wait_is_overdue_beyond_its_limit_or_when_a_silent_rank_does_not_connect() -> None:
    hold = Hold(0, 0, "opening the exchange", CONNECTING)
    assert overdue(hold, None, 0.0, True, "") is None
    hold.since -= CONNECT_S + 1
    assert overdue(hold, None, 0.0, False, "") is None
    assert "not connected after 16 s. Rank 1 is late." in str(
        overdue(hold, None, 0.0, True, " Rank 1 is late.")
    )
    assert overdue(hold, 15.0, 2.5, False, "") is None
    assert "longer than wait_timeout_s=15" in str(overdue(hold, 15.0, 0.0, False, ""))


class LostStore:
    """A status board whose store has gone, from the first call or from the second publication on."""

    def __init__(self, publications: int) -> None:
        self._publications = publications

    def is_reachable(self) -> bool:
        return True

    def raise_alarm(self) -> None: ...

    def hears_alarm(self) -> bool:
        return True

    def publish(self, position: Any) -> None:
        self._publications -= 1
        if self._publications < 0:
            raise RuntimeError("Broken pipe\nand more")

    def read(self) -> None: ...

    def positions(self) -> dict[int, Any]:
        return {}

    def silent_since(self, moment: float) -> list[int]:
        return []


@pytest.mark.parametrize("publications", [0, 1])
def test_a_wait_ends_at_its_limit_though_the_store_is_lost(publications: int) -> None:
    record = FlightRecord("run", "model 1")
    stopping = Stopping(record)
    abandoned = threading.Event()
    stopping.on_failure(abandoned.set)
    waits = Process(0, {}, {})
    monitor = Monitor(0, 2, record, stopping, 0.1, lambda: waits, lambda *_: None)
    monitor.wait_timeout_s = 0.2
    monitor._status_board = LostStore(publications)  # type: ignore[assignment]
    inflight = start(record, "bucket 0")
    monitor.start()
    assert abandoned.wait(10)
    with pytest.raises(
        EffAdamError, match=r"bucket 0, encode: waited . s, longer than wait_timeout"
    ):
        inflight.future.wait()
    if not publications:
        assert "The store of the process group does not answer: Broken pipe." in str(
            stopping.failure
        )
    stopping.begin_closing()
    monitor.wake()
    assert monitor.join()


def test_every_late_hold_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    record = FlightRecord("run", "model 1")
    stopping = Stopping(record)
    monitor = Monitor(0, 2, record, stopping, -10.0, lambda: Process(0, {}, {}), lambda *_: None)
    for label in ("full_state_dict()", "exchange_line()"):
        with record.holding(label, "gathering"):
            for _ in range(2):
                monitor._warn({}, record.oldest)
    assert [r.message.partition(" in ")[2].partition(",")[0] for r in caplog.records] == [
        "full_state_dict()",
        "exchange_line()",
    ]
