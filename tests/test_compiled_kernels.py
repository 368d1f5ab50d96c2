"""The Triton kernels compiled for GPUs that are not here; what the benchmark reads from their code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from machine_code import exchanges_planes, read_sass  # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

SASS = """
kernel:
.text.kernel:
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   LDG.E.U8 R8, desc[UR4][R2.64] ;
        /*0040*/              @!P1 CALL.REL.NOINC `(.L_x_4) ;
        /*0048*/                   BRA `(.L_x_0) ;
.L_x_4:
        /*0050*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   CALL.REL.NOINC `($slow) ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_1:
        /*00a0*/                   STL [R1], R2 ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
"""


def test_the_coded_path_is_the_wide_one_with_its_loop_and_without_subroutines() -> None:
    code = read_sass("REG:40 STACK:0", SASS, trips=4)
    assert code.registers == 40
    assert code.spills == 1
    assert code.total == 14
    assert code.instructions == 3 + 4 * 3 + 1 + 2
    assert (code.loads, code.stores, code.widest_bytes) == (2 + 4, 1, 16)


@pytest.mark.parametrize(("warps", "expected"), [("1, 4, 1", False), ("2, 2, 1", True)])
def test_planes_in_several_warps_are_noticed(warps: str, expected: bool) -> None:
    ttgir = f"""#blocked = #ttg.blocked<{{sizePerThread = [1, 1, 4], threadsPerWarp = [1, 4, 8], \
warpsPerCTA = [{warps}], order = [2, 1, 0]}}>
    %1 = "tt.reduce"(%0) <{{axis = 0 : i32}}> ({{
      tt.reduce.return %2 : f32
    }}) : (tensor<8x16x32xf32, #blocked>) -> tensor<16x32xf32, #ttg.slice<x>>
"""
    assert exchanges_planes(ttgir.replace("\\\n", "")) is expected


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "EFFADAM_TEST_COMPILED" not in os.environ,
    reason="compiles for minutes; set EFFADAM_TEST_COMPILED=1",
)
def test_a_few_variants_compile_and_reach_their_goals(tmp_path: Path) -> None:
    """On sm_80, sm_90, sm_100 and gfx942; all variants are in the benchmark."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compiled_kernels.py", "--check"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    if "ImportError" in done.stderr or "No module named 'triton" in done.stderr:
        pytest.skip("this Triton has another compiler interface")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 variants" in done.stdout
