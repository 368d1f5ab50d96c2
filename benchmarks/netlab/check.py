"""Check of a lab's links: TCP throughput from one host and from all hosts at once."""

from __future__ import annotations

import json
import subprocess
import sys

from .lab import NetLab

__all__ = ["check_links"]

_SERVER = """
import json, socket, sys, threading, time
flows, total = int(sys.argv[1]), 0
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
def take(peer):
    global total
    while data := peer.recv(1 << 18):
        total += len(data)
peers = [server.accept()[0] for _ in range(flows)]
threads = [threading.Thread(target=take, args=(peer,)) for peer in peers]
[t.start() for t in threads]
time.sleep(0.5)
first, start = total, time.monotonic()
time.sleep(float(sys.argv[2]))
print(json.dumps((total - first) * 8 / (time.monotonic() - start)), flush=True)
"""
_CLIENT = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
data = b"x" * (1 << 18)
try:
    while True:
        peer.sendall(data)
except OSError:
    pass
"""
_PING = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(50):
    start = time.monotonic(); peer.sendall(b"x"); peer.recv(1); times.append(time.monotonic() - start)
print(sorted(times)[25] * 1e3)
"""
_ECHO = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
peer = server.accept()[0]
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv(1):
    peer.sendall(data)
"""


def check_links(lab: NetLab, seconds: float = 2.0) -> str:
    """Measure throughput and round trips between hosts of a lab.

    Args:
        lab: The lab, entered as a context manager.
        seconds: Duration of each measurement.

    Returns:
        The report as text.
    """
    one = _throughput(lab, [1], seconds)
    many = _throughput(lab, list(range(1, lab.hosts)), seconds)
    lines = [
        f"{lab.hosts} hosts, {lab.link.name}",
        f"  one host to another      {one / 1e6:8.1f} Mbit/s of payload, {one / lab.link.rate:.3f}",
        f"  {lab.hosts - 1} hosts to one           {many / 1e6:8.1f} Mbit/s of payload, "
        f"{many / lab.link.rate:.3f}",
        f"  round trip of one byte   {_round_trip_ms(lab):8.3f} ms",
    ]
    return "\n".join(lines)


def _start(lab: NetLab, host: int, code: str, *args: object) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", lab.namespace(host), sys.executable, "-c", code]
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _throughput(lab: NetLab, senders: list[int], seconds: float) -> float:
    server = _start(lab, 0, _SERVER, len(senders), seconds)
    port = _line(server)
    clients = [_start(lab, host, _CLIENT, lab.address(0), port) for host in senders]
    try:
        return float(json.loads(_line(server)))
    finally:
        for process in (server, *clients):
            process.kill()
            process.wait()


def _round_trip_ms(lab: NetLab) -> float:
    server = _start(lab, 0, _ECHO)
    client = _start(lab, 1, _PING, lab.address(0), _line(server))
    try:
        return float(_line(client))
    finally:
        for process in (server, client):
            process.kill()
            process.wait()
