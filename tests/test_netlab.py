"""The network lab: what it counts and computes, whom it belongs to, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from netlab import (  # noqa: E402
    LabError,
    Link,
    NetLab,
    RankError,
    WireBytes,
    cleanup,
    lab,
    leftovers,
    read_wire_bytes,
    run_in_lab,
)

MBIT = 1e6


@pytest.mark.parametrize(
    ("text", "rate", "name"),
    [
        ("200mbit", 200e6, "200mbit"),
        ("2.5gbit", 2.5e9, "2.5gbit"),
        ("1 Gbit/s", 1e9, "1gbit"),
        ("2500kbit", 2.5e6, "2.5mbit"),
    ],
)
def test_rates_are_read_as_people_write_them(text: str, rate: float, name: str) -> None:
    link = Link.parse(text)
    assert link.rate == rate
    assert link.name == name
    assert Link.parse(link.name) == link


@pytest.mark.parametrize("text", ["", "1", "1gb", "fast", "-1gbit", "1e3mbit"])
def test_a_rate_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid rate"):
        Link.parse(text)


@pytest.mark.parametrize(("rate", "delay_ms"), [(1e5, 0.0), (1e12, 0.0), (1e9, -1.0), (1e9, 2e3)])
def test_a_link_out_of_range_is_refused(rate: float, delay_ms: float) -> None:
    with pytest.raises(ValueError, match="Must be from"):
        Link(rate, delay_ms)


def test_a_link_is_busy_for_its_bytes_at_its_rate() -> None:
    assert Link(200 * MBIT).seconds(25e6) == 1.0
    assert Link(1000 * MBIT, delay_ms=50.0).seconds(125e6) == 1.0


def test_the_queue_and_the_window_hold_what_is_under_way() -> None:
    near, far = Link(1000 * MBIT), Link(1000 * MBIT, delay_ms=20.0)
    in_flight = 1000 * MBIT / 8 * 2 * 0.020
    assert far.queue_bytes - near.queue_bytes == in_flight
    assert far.window_bytes >= far.queue_bytes + in_flight
    assert near.window_bytes >= 1 << 22


def test_a_delay_is_split_between_the_two_links_of_a_way() -> None:
    (bucket,) = Link(100 * MBIT).shaping("eth0")
    assert bucket[:4] == ["qdisc", "add", "dev", "eth0"]
    assert bucket[bucket.index("rate") + 1] == "100000000bit"
    _, delay = Link(100 * MBIT, delay_ms=10.0).shaping("eth0")
    assert delay[delay.index("delay") + 1] == "5ms"


def test_a_segment_of_64_kib_fits_the_token_bucket_at_any_rate() -> None:
    for rate in (1 * MBIT, 1000 * MBIT, 100_000 * MBIT):
        (bucket,) = Link(rate).shaping("eth0")
        assert int(bucket[bucket.index("burst") + 1]) > 65536


def test_bytes_between_two_readings() -> None:
    passed = WireBytes((110, 30, 7), (20, 95, 7)) - WireBytes((10, 10, 7), (20, 5, 0))
    assert passed == WireBytes((100, 20, 0), (0, 90, 7))
    assert passed.busiest == 100
    assert passed.total == 120


def test_a_lab_is_named_by_its_owner() -> None:
    first, second = NetLab(2, Link(MBIT)), NetLab(2, Link(MBIT))
    assert first.id != second.id
    assert first.id.startswith(f"effadam-{os.getpid()}-")
    assert first.namespace(1) == f"{first.id}-h1"
    assert first.switch == f"{first.id}-sw"
    assert [first.address(host) for host in range(2)] == ["10.77.0.1", "10.77.0.2"]


@pytest.mark.parametrize("hosts", [0, 1, 65])
def test_a_number_of_hosts_out_of_range_is_refused(hosts: int) -> None:
    with pytest.raises(ValueError, match="Invalid hosts"):
        NetLab(hosts, Link(MBIT))


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> list[str]:
    """Makes these the machine's namespaces; returns those that are then removed."""
    removed: list[str] = []
    for name in names:
        (folder / name).touch()
    monkeypatch.setattr(lab, "Path", lambda text: folder if "netns" in text else Path(text))
    monkeypatch.setattr(lab, "_remove", removed.extend)
    return removed


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_cleaning_up_takes_the_labs_of_dead_owners_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = NetLab(2, Link(MBIT))
    pid, start = mine.id.split("-")[1:3]
    # The pid of a living process that started at another time: the owner is gone, its pid is not.
    recycled = f"effadam-{pid}-{int(start) - 1}-0-h0"
    with subprocess.Popen(["true"]) as process:
        process.wait()
    dead = [f"effadam-{process.pid}-{start}-0-h0", f"effadam-{process.pid}-{start}-0-sw"]
    alive = [mine.namespace(0), mine.switch]
    foreign = ["h0", "effadam", "effadam-web-h0", f"{recycled}-blue", f"my-{recycled}"]
    removed = pretend(monkeypatch, tmp_path, [recycled, *dead, *alive, *foreign])
    assert leftovers() == sorted([recycled, *dead])
    assert removed == []
    assert cleanup() == sorted([recycled, *dead])
    assert removed == sorted([recycled, *dead])


def test_closing_a_lab_takes_its_own_namespaces_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = os.getpid()
    monkeypatch.setattr(lab, "_numbers", iter((1, 10)))
    monkeypatch.setattr(lab, "_start_time", lambda _: 5)
    first, tenth = NetLab(2, Link(MBIT)), NetLab(2, Link(MBIT))
    assert (first.id, tenth.id) == (f"effadam-{pid}-5-1", f"effadam-{pid}-5-10")
    names = [first.namespace(0), first.switch, tenth.namespace(0), tenth.switch]
    removed = pretend(monkeypatch, tmp_path, names)
    first.close()
    assert removed == [first.namespace(0), first.switch]


def test_without_root_or_tools_the_lab_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(lab.os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match=r"needs root.*user 1000"):
        NetLab(2, Link(MBIT)).__enter__()
    monkeypatch.setattr(lab.shutil, "which", lambda _: None)
    with pytest.raises(LabError, match="needs the command 'ip'"):
        NetLab(2, Link(MBIT)).__enter__()


# What this machine must allow, tried in a namespace of the lab's kind of name. Not tried through
# NetLab itself: a lab that is wrong must fail the tests and not skip them.
TRIALS = (
    "ip link add eth0 netns {name} type veth peer name p0 netns {name}",
    "ip -n {name} link add br0 type bridge",
    "ip -n {name} addr add 10.77.0.1/24 dev eth0",
    "ip -n {name} link set eth0 up",
    "ip -n {name} route replace 10.77.0.0/24 dev eth0 congctl cubic",
    "ip netns exec {name} sysctl -qw net.ipv4.tcp_no_metrics_save=1",
    "tc -n {name} qdisc add dev eth0 root tbf rate 20mbit burst 100000 limit 1000000",
)


def refusal() -> str | None:
    """Why there can be no lab here; None if there can."""
    try:
        lab.check_possible()
    except LabError as error:
        return str(error)
    name = NetLab(2, Link(MBIT)).switch
    try:
        for command in ("ip netns add {name}", *TRIALS):
            words = command.format(name=name).split()
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
            if done.returncode != 0:
                return f"{' '.join(words)!r} was refused: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=20)
    return None


@pytest.fixture(scope="module")
def _namespaces() -> None:
    reason = refusal()
    if reason is not None:
        pytest.skip(f"no network lab here: {reason}")


def left_of(lab_id: str) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{lab_id}-*")]


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


PAYLOAD_BYTES = 1_000_000
RATE = Link(20 * MBIT)

# Ranks 0 and 1 connect.
MEET = """
import os, socket, time
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    peer = socket.create_server(address).accept()[0]
else:
    while True:
        try:
            peer = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
"""

# Rank 1 sends, rank 0 receives and prints how long it took.
TRANSFER = f"""{MEET}
if os.environ["RANK"] == "0":
    start, count = time.monotonic(), 0
    while data := peer.recv(1 << 16):
        count += len(data)
    assert count == {PAYLOAD_BYTES}, count
    print(time.monotonic() - start)
else:
    peer.sendall(bytes({PAYLOAD_BYTES}))
"""


@pytest.mark.usefixtures("_namespaces")
def test_a_lab_counts_what_is_sent_holds_it_to_the_rate_and_leaves_nothing() -> None:
    with NetLab(2, RATE) as built:
        assert len(left_of(built.id)) == 3
        before = read_wire_bytes(built.id, 2)
        printed = run_in_lab(built, [sys.executable, "-c", TRANSFER], timeout_s=90, quiet=True)
        passed = read_wire_bytes(built.id, 2) - before
    assert left_of(built.id) == []
    # Headers are 66 of 1514 bytes a packet; acknowledgements, and what is sent again, are extra.
    assert 1.04 * PAYLOAD_BYTES < passed.sent[1] < 1.2 * PAYLOAD_BYTES
    assert 1.04 * PAYLOAD_BYTES < passed.received[0] < 1.2 * PAYLOAD_BYTES
    assert passed.sent[0] < 0.1 * PAYLOAD_BYTES
    assert passed.busiest == max(passed.sent[1], passed.received[0])
    # What the token buckets of both ends let pass at once is not held back.
    assert float(printed[0]) > RATE.seconds(PAYLOAD_BYTES - 4 * 65536)


# Every rank prints its place; ranks 0 and 1, which share a host, transfer.
NEIGHBOURS = f"""
import os, sys
print(*(os.environ[f"{{name}}RANK"] for name in ("", "LOCAL_", "GROUP_")), os.environ["WORLD_SIZE"],
      os.environ["LOCAL_WORLD_SIZE"])
if int(os.environ["RANK"]) > 1:
    sys.exit()
{TRANSFER}
"""


@pytest.mark.usefixtures("_namespaces")
def test_ranks_of_a_host_have_torchruns_places_and_their_traffic_is_not_on_its_link() -> None:
    with NetLab(2, RATE, ranks_per_host=2) as built:
        printed = run_in_lab(built, [sys.executable, "-c", NEIGHBOURS], timeout_s=90, quiet=True)
        passed = read_wire_bytes(built.id, 2)
    places = [text.splitlines()[0] for text in printed]
    assert places == ["0 0 0 4 2", "1 1 0 4 2", "2 0 1 4 2", "3 1 1 4 2"]
    assert passed.busiest < 0.1 * PAYLOAD_BYTES


@pytest.mark.parametrize("ranks", [0, 65])
def test_a_number_of_ranks_out_of_range_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match="Invalid ranks_per_host"):
        NetLab(2, RATE, ranks)


# Rank 1 sends bytes one at a time, and prints how long the fastest answer took.
ROUND_TRIPS = f"""{MEET}
if os.environ["RANK"] == "0":
    while data := peer.recv(1):
        peer.sendall(data)
else:
    took = []
    for _ in range(5):
        start = time.monotonic()
        peer.sendall(b"x")
        peer.recv(1)
        took.append(time.monotonic() - start)
    print(min(took))
"""


@pytest.fixture
def _delays(_namespaces: None, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """A lab without netem, or with it if the kernel has it."""
    if request.param == "netem":
        built = NetLab(2, Link(20 * MBIT))
        with built:
            if not built._has_netem():
                pytest.skip("the kernel has no sch_netem")
    else:
        try:
            os.close(os.open("/dev/net/tun", os.O_RDWR))
        except OSError as error:
            pytest.skip(f"no tap interfaces: {error}")
        monkeypatch.setattr(NetLab, "_has_netem", lambda _: False)


@pytest.mark.usefixtures("_delays")
@pytest.mark.parametrize("_delays", ["netem", "process"], indirect=True)
def test_a_delay_is_added_once_each_way_and_nothing_is_lost() -> None:
    with NetLab(2, Link(20 * MBIT, delay_ms=15.0)) as built:
        command = [sys.executable, "-c", ROUND_TRIPS]
        printed = run_in_lab(built, command, timeout_s=90, quiet=True)
        before = read_wire_bytes(built.id, 2)
        transfer = run_in_lab(built, [sys.executable, "-c", TRANSFER], timeout_s=90, quiet=True)
        passed = read_wire_bytes(built.id, 2) - before
    assert left_of(built.id) == []
    assert 0.030 < float(printed[1]) < 0.045
    # What was lost would be sent again.
    assert 1.04 * PAYLOAD_BYTES < passed.sent[1] < 1.1 * PAYLOAD_BYTES
    assert float(transfer[0]) > RATE.seconds(PAYLOAD_BYTES - 4 * 65536)


@pytest.mark.usefixtures("_namespaces")
@pytest.mark.parametrize(("keeps", "value"), [(True, "0"), (False, "1")])
def test_tcp_keeps_its_windows_over_pauses_only_where_the_link_says_so(
    keeps: bool, value: str
) -> None:
    read = ["sysctl", "-n", "net.ipv4.tcp_slow_start_after_idle"]
    link = Link.parse("20mbit", keeps_windows=keeps)
    assert link.name.endswith("+windows") == keeps
    with NetLab(2, link) as built:
        assert run_in_lab(built, read, timeout_s=20, quiet=True) == [f"{value}\n"] * 2


@pytest.mark.usefixtures("_delays")
@pytest.mark.parametrize("_delays", ["process"], indirect=True)
def test_a_delaying_process_that_ends_ends_the_run() -> None:
    with NetLab(2, Link(20 * MBIT, delay_ms=1.0)) as built:
        assert built._delay_process is not None
        threading.Timer(1.0, built._delay_process.kill).start()
        with pytest.raises(LabError, match="process that delays packets has ended"):
            run_in_lab(built, ["sleep", "60"], timeout_s=50, quiet=True)
    assert left_of(built.id) == []


@pytest.mark.usefixtures("_namespaces")
def test_where_nothing_can_delay_packets_the_lab_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetLab, "_has_netem", lambda _: False)
    monkeypatch.setattr(lab.delay, "__file__", "/nowhere/delay.py")
    built = NetLab(2, Link(20 * MBIT, delay_ms=1.0))
    with pytest.raises(LabError, match=r"no sch_netem.*nowhere.*needs the kernel's tun driver"):
        built.__enter__()
    assert left_of(built.id) == []


@pytest.mark.usefixtures("_namespaces")
def test_a_failing_rank_is_reported_and_leaves_nothing() -> None:
    code = "import os, time; rank = os.environ['RANK']; print('host', rank); assert rank == '0'"
    with (
        pytest.raises(RankError, match=r"rank 1 ended with 1\n  \| host 1\n[^$]*AssertionError"),
        NetLab(2, RATE) as built,
    ):
        run_in_lab(built, [sys.executable, "-c", code], timeout_s=90, quiet=True)
    assert left_of(built.id) == []


@pytest.mark.usefixtures("_namespaces")
def test_an_exception_inside_leaves_neither_namespaces_nor_processes() -> None:
    built = NetLab(2, RATE)
    sleepers: list[subprocess.Popen[bytes]] = []

    def start_and_fail() -> None:
        with built:
            inside = ["ip", "netns", "exec", built.namespace(0), "sleep", "300"]
            sleepers.append(subprocess.Popen(inside))
            while not processes_in(built.namespace(0)):
                time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_and_fail()
    assert [sleeper.wait(timeout=60) for sleeper in sleepers] == [-signal.SIGKILL]
    assert left_of(built.id) == []


def processes_in(namespace: str) -> list[int]:
    command = ["ip", "netns", "pids", namespace]
    return [int(pid) for pid in subprocess.check_output(command, text=True).split()]


OWNER = f"""
import signal, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
from netlab import Link, NetLab, run_in_lab
with NetLab(2, Link(20e6)) as lab:
    print(lab.id, flush=True)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    run_in_lab(lab, [sys.executable, "-c", code])
"""


Owner = tuple["subprocess.Popen[str]", str, int]


@pytest.fixture
def owner(_namespaces: None) -> Iterator[Owner]:
    """A process that has a lab; the lab's name, and the pid of a rank in it."""
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            lab_id = process.stdout.readline().strip()
            yield process, lab_id, int(process.stdout.readline())
        finally:
            process.kill()
            process.wait()
            cleanup()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_the_owner_leaves_neither_namespaces_nor_processes(
    number: signal.Signals, owner: Owner
) -> None:
    process, lab_id, rank = owner
    assert is_running(rank)
    assert len(left_of(lab_id)) == 3
    process.send_signal(number)
    assert process.wait(timeout=60) == {signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT}[number]
    assert left_of(lab_id) == []
    assert not is_running(rank)


def test_the_lab_of_a_killed_owner_is_found_and_taken_down(owner: Owner) -> None:
    process, lab_id, rank = owner
    names = left_of(lab_id)
    assert not set(leftovers()) & set(names)
    process.kill()
    process.wait(timeout=60)
    assert set(leftovers()) >= set(names)
    assert set(cleanup()) >= set(names)
    assert left_of(lab_id) == []
    assert not is_running(rank)
