"""Check wheels before they are uploaded: tag, size and contents. Needs nothing but Python.

python tests/check_wheel.py [--compiled | --pure] dist/*.whl
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

MAX_BYTES = 440_000
MAX_LIBRARY_BYTES = 120_000
"""Uncompressed: a library that was not stripped is larger."""
PACKAGES = ("effadam_hook", "lightning_plugin")
LIBRARY = re.compile(r"effadam_hook/kernels/_cpu\.(so|dylib|dll)")
BINARY = re.compile(r"\.(so|dylib|dll|pyd|a|o)$")


def problems(wheel: Path, *, is_compiled: bool) -> list[str]:
    """Compare a wheel with what it must be.

    Args:
        wheel: The file.
        is_compiled: Whether it must carry the compiled kernels.

    Returns:
        One sentence for each rule that it breaks, with the value seen.
    """
    found = []
    tag = wheel.stem.split("-", 2)[2]
    if not tag.startswith("py3-none-"):
        found.append(f"the tag is {tag}; must be py3-none-PLATFORM")
    if is_compiled and tag.endswith("-any"):
        found.append(f"the tag is {tag}, but a library runs on one platform only")
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        found.append(f"{size} bytes; must be at most {MAX_BYTES}")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        names = list(sizes)
        (about,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        lines = archive.read(about).decode().splitlines()
    pure = "Root-Is-Purelib: " + ("false" if is_compiled else "true")
    if pure not in lines:
        found.append(f"WHEEL lacks the line {pure!r}")
    libraries = [name for name in names if BINARY.search(name)]
    if is_compiled and not (len(libraries) == 1 and LIBRARY.fullmatch(libraries[0])):
        found.append(f"the binaries are {libraries}; must be effadam_hook/kernels/_cpu.so alone")
    found += [
        f"{name} has {sizes[name]} bytes; must have at most {MAX_LIBRARY_BYTES}"
        for name in libraries
        if sizes[name] > MAX_LIBRARY_BYTES
    ]
    if not is_compiled and libraries:
        found.append(f"the binaries are {libraries}; must be none")
    metadata = about.partition("/")[0]
    others = {name.partition("/")[0] for name in names} - {metadata, *PACKAGES}
    if others:
        found.append(f"beside the packages there is {', '.join(sorted(others))}")
    needed = [f"{package}/py.typed" for package in PACKAGES] + ["effadam_hook/kernels/reference.py"]
    missing = [name for name in needed if name not in names]
    if missing:
        found.append(f"there is no {', '.join(missing)}")
    if not any(name.endswith("/LICENSE") for name in names):
        found.append("there is no LICENSE")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--compiled", action="store_true", help="the wheels carry the kernels")
    kind.add_argument("--pure", action="store_true", help="the wheels carry no library")
    parser.add_argument("wheels", nargs="+", type=Path)
    args = parser.parse_args()
    failed = False
    for wheel in args.wheels:
        found = problems(wheel, is_compiled=args.compiled)
        failed = failed or bool(found)
        print(f"{wheel.name}: {wheel.stat().st_size} bytes: {'; '.join(found) or 'right'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
