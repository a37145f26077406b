"""The Triton kernels equal the reference bit for bit: interpreted on a CPU, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parents[2]


def run(device, **environment):
    # The interpreter is chosen when triton is imported, so it needs a process of its own.
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_claims.py")), device],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_interpreted_kernels_equal_the_reference():
    result = run("cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "equal\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_compiled_kernels_equal_the_reference():
    result = run("cuda")
    assert result.returncode == 0, result.stderr


def test_what_the_kernels_cannot_prune_is_refused_with_the_reason():
    from sparsetrain.ops import triton_kernels

    assert triton_kernels.supports(torch.empty(16, 16), 2, 4) is None
    for weight, m, reason in (
        (torch.empty(16, 16).t()[:8], 4, "not a contiguous matrix"),
        (torch.empty(16, 16), 5, "m=5 is not 2, 4, 8 or 16"),
        (torch.empty(16, 12), 4, r"not divisible by 8"),
        (torch.empty(16, 16, dtype=torch.float64), 4, "torch.float64"),
    ):
        assert reason in triton_kernels.supports(weight, 2, m)
        with pytest.raises(ValueError, match=f"cannot prune this weight: .*{reason}"):
            triton_kernels.prune_dual(weight, 2, m, torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs contiguous float32 tensors; got torch.bfloat16"):
        triton_kernels.add_decay_(torch.zeros(8).bfloat16(), torch.zeros(8), torch.zeros(1, dtype=torch.uint8), 0.1)
