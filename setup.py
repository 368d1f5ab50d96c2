"""Build the compiled CPU kernels, where there is a compiler for them, and the index's front page.

The kernels are a plain shared library behind a C ABI, loaded with ctypes: no torch headers and no
Python headers, so one wheel per platform serves every version of Python and torch. A failed build
is a warning, not an error: the wheel is then pure Python and runs the reference kernels, and says so.

``EFFADAM_BUILD_KERNELS=0`` skips the build; ``EFFADAM_BUILD_KERNELS=1`` makes a failed build an error,
which is what a release wants. The sources are GNU C (vector extensions), which MSVC does not compile.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE_FOLDER = Path("effadam_hook/kernels/csrc")
BUILD_VARIABLE = "EFFADAM_BUILD_KERNELS"
LIBRARY = "effadam_hook.kernels._cpu"

# No -march: the kernels choose their instructions at run time. No -ffast-math: NaN and Inf must
# survive, and no contraction, so that every build encodes and decodes to the same bits. Without
# trapping and errno, which change no result, comparisons and roots become vector instructions. Loops
# are vectorized as with -O3, and unrolled where the sources say so: everywhere would double the size.
COMPILE_FLAGS = [
    "-O2",
    "-ftree-vectorize",
    "-std=c11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-wrapv",  # Python's own flags often have -fwrapv, for which no loop counter is simple
    "-fvisibility=hidden",
    "-fno-asynchronous-unwind-tables",
    "-g0",  # Python's own flags often ask for debugging information, which is most of the file
    "-pthread",
]
LINK_FLAGS = ["-pthread", "-Wl,-x"]
if sys.platform != "darwin":
    # Flags of GCC. The last two make the library a sixth smaller, and no slower: no vector
    # instructions for the remainders of vectorized loops, and no second scheduling.
    COMPILE_FLAGS += [
        "-fvect-cost-model=dynamic",
        "--param=vect-epilogues-nomask=0",
        "-fno-schedule-insns2",
    ]
    LINK_FLAGS = ["-pthread", "-Wl,--strip-all", "-Wl,-z,noseparate-code"]


class BuildLibrary(build_ext):
    """Build a shared library whose name does not depend on the interpreter."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, where the compiler understands the sources."""
        if self.compiler.compiler_type == "msvc":
            raise CompileError("MSVC does not compile these sources; use GCC or Clang")
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:
        """Copy, and remove libraries that earlier versions left there under another name."""
        super().copy_extensions_to_source()
        target = SOURCE_FOLDER.parent / Path(self.get_ext_filename(LIBRARY)).name
        for other in target.parent.glob(f"{target.stem}.*{target.suffix}"):
            if target.exists() and other != target:
                other.unlink()

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name without a tag such as ``cpython-311-x86_64-linux-gnu``."""
        suffix = ".dll" if sys.platform == "win32" else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return nothing: the sources mark what they export, and there is no ``PyInit``."""
        return []


class PlatformWheel(bdist_wheel):
    """Tag the wheel ``py3-none-PLATFORM``, or ``py3-none-any`` if no library was built."""

    def run(self) -> None:
        """Build first: the tag depends on what the compiler did."""
        if not self.skip_build:
            self.run_command("build")
        outputs = self.get_finalized_command("build_ext").get_outputs()
        self.root_is_pure = not any(Path(name).exists() for name in outputs)
        if self.root_is_pure:
            self.distribution.ext_modules = []  # the packages then install as pure Python
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag without the interpreter."""
        return ("py3", "none", super().get_tag()[2])


def kernels() -> list[Extension]:
    """Return the library to build; nothing where there are no sources, or none is wanted."""
    wanted = os.environ.get(BUILD_VARIABLE, "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(
            f"Invalid {BUILD_VARIABLE}: {wanted!r}. Must be 0 (build no kernels), 1 (fail without a "
            "compiler) or auto."
        )
    sources = sorted(path.as_posix() for path in SOURCE_FOLDER.glob("*.c"))
    if wanted == "0" or not sources:
        return []
    library = Extension(
        LIBRARY,
        sources=sources,
        depends=sorted(path.as_posix() for path in SOURCE_FOLDER.glob("*.h")),
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=LINK_FLAGS,
        libraries=["m"],
        optional=wanted == "auto",
    )
    return [library]


def front_page() -> str:
    """Return README.md with absolute links, as the files are not beside it, and without comments."""
    address = re.search(r'^Repository = "(.+)"$', Path("pyproject.toml").read_text("utf-8"), re.M)
    if address is None:
        raise SystemExit('pyproject.toml has no line Repository = "..." below [project.urls].')

    def absolute(match: re.Match[str]) -> str:
        before, target = match.groups()
        kind = "raw" if re.search(r"\.(png|svg|gif|jpe?g)$", target) else "blob"
        return f"{before}{address[1]}/{kind}/main/{target}"

    text = re.sub("<!--.*?-->", "", Path("README.md").read_text("utf-8"))
    return re.sub(r'(\]\(|\b(?:href|src|srcset)=")(?![a-z]+:|#|/)([^)"\s]+)', absolute, text)


setup(
    long_description=front_page(),
    long_description_content_type="text/markdown",
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
