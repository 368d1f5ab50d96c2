"""The choice of the kernels, and its warnings."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from effadam_hook import kernels
from effadam_hook.kernels import KERNELS_VARIABLE, choose, cpu, describe, reference, select
from kernel_cases import needs_library

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_kernels_forced_and_no_warning_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_warned", set())


@needs_library
def test_the_compiled_kernels_run_where_they_can() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(CPU).name == "cpu"
    choice = choose(CPU)
    assert choice.reason.startswith("cpu: compiled C, ")
    assert choice.remedy is None


def test_without_a_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise ImportError("no compiled library _cpu*.so in /somewhere")

    monkeypatch.setattr(cpu, "load", missing)
    with pytest.warns(RuntimeWarning, match=r"runs its reference kernels.*Install a C compiler"):
        assert select(CPU).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(CPU).name == "reference"
    assert choose(CPU).reason == "reference: no compiled library _cpu*.so in /somewhere"
    said = describe(select(CPU), CPU)
    assert said.startswith("reference (no compiled library _cpu*.so in /somewhere. Install a C com")
    monkeypatch.setenv(KERNELS_VARIABLE, "cpu")
    with pytest.raises(ImportError, match=r"EFFADAM_KERNELS=cpu was given, but no compiled"):
        select(CPU)


def test_on_windows_the_remedy_is_not_to_install_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.load.cache_clear()
    try:
        choice = choose(CPU)
    finally:
        cpu.load.cache_clear()
    assert choice.kernels is reference
    assert "_cpu.dll" in choice.reason
    assert "Wheels for Windows carry no compiled kernels" in (choice.remedy or "")


@needs_library
@pytest.mark.parametrize("name", ["_cpu.so", "_cpu.dylib", "_cpu.dll", "_cpu.cpython-311-x.so"])
def test_a_library_is_found_under_the_names_of_every_system(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(cpu.libraries()[0], tmp_path / name)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.load.cache_clear()
    try:
        assert cpu.CpuKernels(cpu.load()).variants[-1] == "plain"
    finally:
        cpu.load.cache_clear()


def test_a_library_of_an_earlier_version_is_not_preferred(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("_cpu.cpython-311-x86_64-linux-gnu.so", "_cpu.so", "_cpu.abi3.so", "cpu.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    names = [path.name for path in cpu.libraries()]
    assert names == ["_cpu.so", "_cpu.abi3.so", "_cpu.cpython-311-x86_64-linux-gnu.so"]


def test_without_triton_the_reference_runs_on_cuda_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"Triton is not installed\. Install it"):
        assert select(CUDA).name == "reference"


@needs_library
def test_the_description_follows_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"compiled C \(\w+\)", describe(select(CPU), CPU))
    assert describe(reference, CPU) == "reference"
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert describe(select(CPU), CPU) == "reference (set by EFFADAM_KERNELS)"
    monkeypatch.setenv(KERNELS_VARIABLE, "fast")
    assert describe(reference, CPU) == "reference"


@needs_library
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert choose(CPU).reason == "reference: set by EFFADAM_KERNELS"
    monkeypatch.setenv(KERNELS_VARIABLE, "cpu")
    assert select(CPU).name == "cpu"
    with pytest.raises(ImportError, match="EFFADAM_KERNELS=cpu was given, but the bucket is on"):
        select(CUDA)
    monkeypatch.setenv(KERNELS_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"Invalid EFFADAM_KERNELS: 'fast'\. Must be one of"):
        select(CPU)


def test_a_device_without_kernels_of_its_own_runs_the_reference() -> None:
    assert choose(torch.device("meta")).reason.startswith("reference: there are no fused kernels")


def test_a_library_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_cpu.broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.load.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"_cpu\.broken\.so: "):
            cpu.load()
    finally:
        cpu.load.cache_clear()
