"""What environment variables choose: the instruction set, and the reference kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchbp import kernels

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
QUICK = "equals_torch or accurate or special or conversions or layout or float16 or element"


def python(*arguments: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def run_tests(**environment: str) -> None:
    names = (
        "test_bias_act.py",
        "test_blame_reduce.py",
        "test_blame_settle.py",
        "test_conv_grad_weight.py",
    )
    files = [str(HERE / name) for name in names]
    python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", QUICK, *files, **environment)


STATUS = "from torchbp import kernels; s = kernels.status(); print(s['isa'], s['reason'])"


@pytest.mark.skipif(not kernels.HAS_EXT, reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_lower_instruction_sets(isa):
    order = ["base", "avx2", "avx512"]
    best = str(kernels.status()["isa"])
    expected = min(isa, best, key=order.index)
    assert python("-c", STATUS, TORCHBP_CPU_CAPABILITY=isa).split() == [expected]
    if expected != best:
        run_tests(TORCHBP_CPU_CAPABILITY=isa)


def test_reference_on_demand():
    assert python("-c", STATUS, TORCHBP_REFERENCE="1").split() == [
        "reference",
        "TORCHBP_REFERENCE=1",
    ]
    run_tests(TORCHBP_REFERENCE="1")


def test_importing_the_kernels_imports_nothing_else_of_torchbp():
    code = (
        "import sys; import torchbp; before = set(sys.modules); import torchbp.kernels;"
        "new = {m for m in set(sys.modules) - before if m.startswith('torchbp')};"
        "print(*(m for m in new if not m.startswith(('torchbp.kernels', 'torchbp._C'))))"
    )
    assert python("-c", code).strip() == ""
