"""The installation: one version, torch alone beside it; wheels of every kind, and a source archive.

The archive is made from a copy of this tree with what work leaves behind, and everything else from
the archive: what it lacks is missing here as it would be for a packager.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from check_wheel import MAX_BYTES, problems

ROOT = Path(__file__).parent.parent
PACKAGES = ("effadam_hook", "lightning_plugin")
NO_COMPILER = {"CC": "/nonexistent/cc"}
RELEASE = {"EFFADAM_BUILD_KERNELS": "1"}

BROKEN_KERNEL = "this is no C\n"
KERNEL = "int effadam_test_answer(void) { return 42; }\n"
LEFT_BEHIND = (
    "effadam_hook/kernels/_cpu.cpython-311-x86_64-linux-gnu.so",
    "effadam_hook/kernels/_cpu.dll",
    "tests/__pycache__/harness.cpython-311.pyc",
    "examples/outputs/run.json",
    "examples/lightning_logs/version_0/hparams.yaml",
    "docs/model.pt",
    "outputs/run.json",
)

pytestmark = pytest.mark.filterwarnings("error")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler"
)


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python, away from this tree: only ``variables`` say where packages are."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("EFFADAM_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def build_wheel(source: Path, folder: Path, *options: str, **variables: str) -> Path:
    """Build a wheel, without the network, as pip does; return it."""
    common = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
    command = ["-m", "pip", "wheel", *common, "-w", str(folder), *options, str(source)]
    done = run(command, folder.parent, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source / "build", ignore_errors=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed() -> Distribution:
    return distribution("effadam-hook")


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the source archive; it lies unpacked where :func:`source` says."""
    folder = tmp_path_factory.getbasetemp() / "packaging"
    tree = folder / "tree"
    patterns = (".git", ".venv", "build", "dist", "outputs", "*.egg-info", "*_cache", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*patterns, "*.so", "site"))
    for name in LEFT_BEHIND:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left behind\n")
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('../dist'))"
    (folder / "dist").mkdir()
    done = run(["-c", build], tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
        archive.extractall(folder)
    (folder / path.name.removesuffix(".tar.gz")).rename(folder / "source")
    return [name.partition("/")[2] for name in names]


@pytest.fixture(scope="module")
def source(archived: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "packaging" / "source"


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build_wheel(source, source.parent / "compiled", **RELEASE)


@pytest.fixture(scope="module")
def pure_wheel(source: Path) -> Path:
    return build_wheel(source, source.parent / "pure", **NO_COMPILER)


@pytest.fixture(scope="module")
def metadata(pure_wheel: Path) -> Iterator[Distribution]:
    with zipfile.ZipFile(pure_wheel) as archive:
        (about,) = {n.partition("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        yield PathDistribution(zipfile.Path(archive, f"{about}/"))


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
    assert extras == {
        *("accelerate", "cli", "dev", "docs", "examples", "lightning", "transformers")
    }


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


@needs_compiler
def test_a_wheel_with_kernels_serves_every_python_on_one_platform(wheel: Path) -> None:
    assert problems(wheel, is_compiled=True) == []
    names = set(names_in(wheel))
    for package in PACKAGES:
        assert {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")} <= names


def test_without_a_compiler_the_wheel_is_pure_python(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert problems(pure_wheel, is_compiled=False) == []


def test_a_wheel_without_kernels_can_be_for_one_platform(source: Path, tmp_path: Path) -> None:
    option = "-C--build-option=--plat-name=win_amd64"
    wheel = build_wheel(source, tmp_path / "windows", option, EFFADAM_BUILD_KERNELS="0")
    assert wheel.name.endswith("-py3-none-win_amd64.whl")
    assert problems(wheel, is_compiled=False) == []


@pytest.mark.parametrize(
    ("value", "message"), [("1", "nonexistent"), ("yes", "Invalid EFFADAM_BUILD_KERNELS: 'yes'")]
)
def test_a_release_does_not_lose_its_kernels(source: Path, value: str, message: str) -> None:
    build = "from setuptools.build_meta import build_wheel; build_wheel('../failed')"
    done = run(["-c", build], source, EFFADAM_BUILD_KERNELS=value, **NO_COMPILER)
    shutil.rmtree(source / "build", ignore_errors=True)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def what_runs(wheel: Path, folder: Path) -> tuple[dict[str, str], str]:
    """Unpack a wheel, use it, and return ``effadam env``'s line for the CPU and what was warned."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    code = "import torch, effadam_hook.kernels as k; k.select(torch.device('cpu'))"
    warned = run(["-c", code], folder, PYTHONPATH=str(folder)).stderr
    done = run(["-m", "effadam_hook", "env", "--json"], folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    line: dict[str, str] = json.loads(done.stdout)["kernels"]["cpu"]
    return line, warned


@needs_compiler
def test_an_installed_wheel_runs_its_kernels(wheel: Path, tmp_path: Path) -> None:
    line, warned = what_runs(wheel, tmp_path)
    assert (line["kernels"], line["remedy"], warned) == ("cpu", "", "")


def test_an_installed_pure_wheel_runs_and_says_what_is_missing(
    pure_wheel: Path, tmp_path: Path
) -> None:
    line, warned = what_runs(pure_wheel, tmp_path)
    assert line["kernels"] == "reference"
    assert "no compiled library _cpu.so" in line["reason"]
    assert "Install a C compiler" in line["remedy"]
    assert "RuntimeWarning: effadam_hook runs its reference kernels" in warned


def test_the_source_archive_is_the_whole_repository(archived: list[str]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("this is not a clone")
    tracked = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    assert sorted(set(tracked) - set(archived)) == []


def test_the_source_archive_has_nothing_that_work_leaves_behind(archived: list[str]) -> None:
    assert sorted(set(archived) & set(LEFT_BEHIND)) == []
    assert [name for name in archived if re.search(r"\.(pyc|so|dylib|dll|pt|ckpt)$", name)] == []


@needs_compiler
def test_the_tests_of_the_source_archive_run_with_the_wheel(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    base = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(source / "pyproject.toml")]
    names = ("test_layout.py", "test_bits.py")
    files = [str(source / "tests" / name) for name in names]
    # Two ranks, and digests that only compiled kernels give.
    one_run = "not recorded_ones or sign-2-rank0"
    done = run([*base, "-k", one_run, *files], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels are not built" not in done.stdout
    collect = [*base, "--collect-only", str(source / "tests")]
    done = run(collect, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_index_shows_no_link_that_leads_nowhere(metadata: Distribution) -> None:
    urls = dict(url.split(", ", 1) for url in metadata.metadata.get_all("Project-URL") or [])
    page = str(metadata.metadata["Description"] or metadata.metadata.get_payload())
    targets = re.findall(r'\]\(([^)\s]+)\)|\b(?:href|src|srcset)="([^"]+)"', page)
    links = [one or other for one, other in targets]
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "<!--" not in page
    ours = [link for link in links if link.startswith(urls["Repository"])]
    for link in ours:
        path = re.sub(r"#.*", "", link).removeprefix(urls["Repository"])
        assert (ROOT / path.split("/main/", 1)[1]).exists(), link


def test_the_address_of_the_repository_is_the_same_everywhere(
    archived: list[str], source: Path, metadata: Distribution
) -> None:
    urls = dict(url.split(", ", 1) for url in metadata.metadata.get_all("Project-URL") or [])
    elsewhere = []
    for name in archived:
        if Path(name).suffix in {".md", ".toml", ".cff", ".yml", ".yaml", ".py"}:
            text = (source / name).read_text("utf-8")
            for url in re.findall(r"https://github\.com/[\w.-]+/effadam-hook", text):
                if url != urls["Repository"]:
                    elsewhere.append((name, url))
    assert elsewhere == []


def test_the_citation_is_of_this_version() -> None:
    from effadam_hook._version import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_the_classifiers_name_every_python_from_the_oldest_that_is_allowed(
    metadata: Distribution,
) -> None:
    allowed = Requirement(f"python{metadata.metadata['Requires-Python']}").specifier
    classifiers = metadata.metadata.get_all("Classifier") or []
    named = [m[1] for c in classifiers if (m := re.fullmatch(r".*Python :: (3\.\d+)", c))]
    assert named == [f"3.{minor}" for minor in range(10, 10 + len(named))]
    assert allowed.contains("3.10") and not allowed.contains("3.9")
    assert ".".join(map(str, sys.version_info[:2])) in named


@needs_compiler
@pytest.mark.parametrize(("kernel", "is_built"), [(KERNEL, True), (BROKEN_KERNEL, False)])
def test_a_kernel_that_does_not_compile_leaves_a_working_package(
    kernel: str, is_built: bool, tmp_path: Path
) -> None:
    wheel = build_wheel(small_project(tmp_path, kernel), tmp_path / "wheels")
    libraries = [name for name in names_in(wheel) if "/_cpu" in name]
    assert "effadam_hook/__init__.py" in names_in(wheel)
    assert libraries == (["effadam_hook/kernels/_cpu.so"] if is_built else [])
    assert wheel.name.endswith("-py3-none-any.whl") is not is_built


@needs_compiler
def test_a_build_in_place_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    project = small_project(tmp_path, KERNEL)
    old = project / "effadam_hook" / "kernels" / "_cpu.cpython-311-x86_64-linux-gnu.so"
    old.touch()
    done = run(["setup.py", "-q", "build_ext", "--inplace"], project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in old.parent.glob("_cpu*")] == ["_cpu.so"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_demo_says_how_much_it_downloads_before_it_does(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "effadam_hook/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    command = ["make", "demo", "PYTHON=echo now: && false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said, _, installs = done.stdout.partition("now:")
    assert re.search(r"downloads about \d+ MB", said)
    assert "-m venv" in installs
    assert done.returncode != 0


def small_project(folder: Path, kernel: str) -> Path:
    project = folder / "small"
    (project / "effadam_hook" / "kernels" / "csrc").mkdir(parents=True)
    (project / "effadam_hook" / "kernels" / "csrc" / "kernel.c").write_text(kernel)
    for package in ("effadam_hook", "effadam_hook/kernels", "lightning_plugin"):
        (project / package).mkdir(exist_ok=True)
        (project / package / "__init__.py").touch()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "effadam_hook/_version.py"):
        shutil.copy(ROOT / name, project / name)
    return project


@pytest.mark.parametrize(
    ("tag", "is_compiled", "files", "problem"),
    [
        ("cp311-cp311-linux_x86_64", True, {}, "the tag is cp311-cp311-linux_x86_64; must be"),
        ("py3-none-any", True, {}, "a library runs on one platform only"),
        ("py3-none-any", False, {"effadam_hook/kernels/_cpu.so": 9}, "must be none"),
        ("py3-none-linux_x86_64", True, {"effadam_hook/kernels/_cpu.x.so": 9}, "the binaries are"),
        ("py3-none-any", False, {"tests/test_all.py": 9}, "beside the packages there is tests"),
        ("py3-none-any", False, {"effadam_hook/big": MAX_BYTES}, "bytes; must be at most"),
        ("py3-none-any", False, {}, "there is no effadam_hook/py.typed"),
        ("py3-none-any", False, {}, "there is no LICENSE"),
        ("py3-none-any", True, {}, "WHEEL lacks the line 'Root-Is-Purelib: false'"),
    ],
)
def test_a_wrong_wheel_is_not_uploaded(
    tag: str, is_compiled: bool, files: dict[str, int], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / f"effadam_hook-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("effadam_hook-1.0.dist-info/WHEEL", "Root-Is-Purelib: true\n")
        for name, size in files.items():
            archive.writestr(name, bytes(size))
    assert any(problem in found for found in problems(path, is_compiled=is_compiled))
