"""What users install: one version, torch alone beside it, types and kernel sources included."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGES = ("effadam_hook", "lightning_plugin")

BROKEN_KERNEL = "this is no C\n"
KERNEL = "int effadam_test_answer(void) { return 42; }\n"


@pytest.fixture(scope="module")
def installed() -> Distribution:
    return distribution("effadam-hook")


def build_wheel(source: Path, folder: Path) -> list[str]:
    """Builds a wheel of a copy of the sources; returns the names of the files in it."""
    copy = folder / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for package in PACKAGES:
        shutil.copytree(source / package, copy / package, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(source / name, copy / name)
    return wheel_names(copy, folder / "wheels")


def wheel_names(source: Path, folder: Path) -> list[str]:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_version_is_the_same_everywhere(installed: Distribution) -> None:
    from effadam_hook._version import __version__

    assert installed.version == __version__
    assert re.search(
        rf"^## \[{re.escape(__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_torch_is_the_only_requirement(installed: Distribution) -> None:
    requirements = [Requirement(text) for text in installed.requires or []]
    always = [r.name for r in requirements if r.marker is None or "extra" not in str(r.marker)]
    assert always == ["torch"]


def test_every_extra_is_there(installed: Distribution) -> None:
    extras = set(installed.metadata.get_all("Provides-Extra") or [])
    assert extras == {"cli", "dev", "docs", "examples", "lightning"}


def test_every_command_can_be_loaded(installed: Distribution) -> None:
    for command in installed.entry_points:
        assert callable(command.load())


def test_the_pinned_versions_satisfy_the_requirements(installed: Distribution) -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name] = version
    for requirement in map(Requirement, installed.requires or []):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_a_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    names = build_wheel(ROOT, tmp_path)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} <= set(PACKAGES)
    assert "effadam_hook/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    for package in PACKAGES:
        if (ROOT / package / "__init__.py").exists():
            sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
            assert sources <= set(names)


@pytest.mark.parametrize(("kernel", "is_built"), [(KERNEL, True), (BROKEN_KERNEL, False)])
def test_a_kernel_that_does_not_compile_leaves_a_working_package(
    kernel: str, is_built: bool, tmp_path: Path
) -> None:
    source = tmp_path / "small"
    folder = source / "effadam_hook" / "kernels" / "csrc"
    folder.mkdir(parents=True)
    (folder / "kernel.c").write_text(kernel)
    for package in ("effadam_hook", "effadam_hook/kernels", "lightning_plugin"):
        (source / package).mkdir(exist_ok=True)
        (source / package / "__init__.py").touch()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "effadam_hook/_version.py"):
        shutil.copy(ROOT / name, source / name)
    names = wheel_names(source, tmp_path / "wheels")
    assert "effadam_hook/__init__.py" in names
    assert "effadam_hook/kernels/csrc/kernel.c" in names
    assert any(re.match(r"effadam_hook/kernels/_cpu.*\.so", name) for name in names) is is_built
