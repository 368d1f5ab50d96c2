"""Programs under torchrun: the printed commands start several hosts, and options reach the program."""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from effadam_hook.cli import main
from effadam_hook.cli.command import build_parser

ROOT = Path(__file__).parent.parent


def printed_commands() -> Iterator[str]:
    """Yield the torchrun commands for several hosts in documents, examples and sources."""
    files = [ROOT / "README.md"]
    for folder in ("docs", "examples", "effadam_hook", "lightning_plugin"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".md", ".py")]
    for path in files:
        text = path.read_text().replace("\\\n", " ").replace('"\n', " ")
        yield from re.findall(r"torchrun --nnodes[^\n]*", text)


def test_every_printed_command_for_several_hosts_names_a_rendezvous() -> None:
    commands = list(printed_commands())
    assert len(commands) >= 3
    for command in commands:
        assert "--rdzv-backend c10d" in command or "--node-rank" in command, command


def start_agent(arguments: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=ROOT,
        env={name: value for name, value in env.items() if name not in ("RANK", "WORLD_SIZE")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(150)
def test_the_documented_command_runs_with_two_agents_on_one_host() -> None:
    text = (ROOT / "docs" / "command.md").read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if line.strip().startswith("torchrun --nn"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command.replace("HOST:29500", f"127.0.0.1:{port}").replace("124M", "100K")
    words = re.sub(r"--nnodes \d+", "--nnodes 2", command).split()[1:]
    agents = [start_agent([*words, "--methods", "lloyd4"]) for _ in range(2)]
    try:
        outputs = [agent.communicate(timeout=60) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # an agent ends its ranks on this signal, and only on this
        for agent in agents:
            agent.wait(timeout=30)
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    text = " ".join(out for out, _ in outputs)
    assert "2 ranks over gloo, 2 on this machine" in text
    assert "All 2 ranks are on one machine" in " ".join(text.split())


def first_names(parser: argparse.ArgumentParser) -> set[str]:
    """The first name of every option: the one that documents use."""
    names: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names |= {name for sub in action.choices.values() for name in first_names(sub)}
        names |= set(action.option_strings[:1])
    return names - {"-h", "--version"}


def test_torchrun_passes_every_option_of_examples_and_command_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_text

    example = train_text.build_parser()
    names = first_names(example) | first_names(build_parser()[0])
    assert {"--run-log", "--compute-ms"} <= names
    for name in names:
        read = get_args_parser().parse_args(["--nproc-per-node", "2", "program.py", name, "x"])
        assert read.training_script_args == [name, "x"]
    assert example.parse_args(["--log", "a"]).log == Path("a")


def test_the_hint_without_a_launcher_is_the_documented_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench"]) == 2
    hint = " ".join(capsys.readouterr().err.split())
    assert "--rdzv-backend c10d --rdzv-endpoint HOST:29500 -m effadam_hook bench" in hint
