"""Adds the compiled CPU kernels, where their source and a C compiler exist.

The kernels are a plain shared library behind a C ABI, loaded with ctypes: no torch headers, so
one build serves every version of torch. ``optional`` turns a failed build into a warning; the
package then runs its reference kernels, and says so.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCE_FOLDER = Path("effadam_hook/kernels/csrc")

# No -march: the kernels choose their instructions at run time. No -ffast-math: NaN and Inf must
# survive, and no contraction, so that every build encodes and decodes to the same bits. Without
# trapping and errno, which change no result, comparisons and roots become vector instructions.
COMPILE_FLAGS = [
    "-O3",
    "-std=c11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
]

sources = sorted(path.as_posix() for path in SOURCE_FOLDER.glob("*.c"))
kernels = Extension(
    "effadam_hook.kernels._cpu",
    sources=sources,
    depends=sorted(path.as_posix() for path in SOURCE_FOLDER.glob("*.h")),
    extra_compile_args=COMPILE_FLAGS,
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[kernels] if sources else [])
