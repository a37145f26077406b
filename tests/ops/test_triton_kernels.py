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


# The GPUs' machine code, which needs no GPU to make: A100, H100.
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability):
    result = run("compile", CAPABILITY=str(capability))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "compiled\n"


def test_what_the_kernels_cannot_prune_is_refused_with_the_reason():
    from sparsetrain.ops import triton_kernels

    assert triton_kernels.obstacle(torch.empty(16, 16), 4, backward=True) is None
    assert triton_kernels.obstacle(torch.empty(10, 16), 4, backward=False) is None
    for weight, m, reason in (
        (torch.empty(16, 16).t()[:8], 4, "neither contiguous nor channels_last"),
        (torch.empty(16, 16, 3, 3).transpose(2, 3), 4, "neither contiguous nor channels_last"),
        (torch.empty(15, 15), 5, "m=5 is not 2, 4, 8 or 16"),
        (torch.empty(16, 10), 4, "not divisible by 4"),
        (torch.empty(10, 16), 4, "not divisible by 4"),
        (torch.empty(16, 16, dtype=torch.float64), 4, "torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"cannot prune this weight: .*{reason}"):
            triton_kernels.prune_dual_t(weight, 2, m, torch.bfloat16)
    weight = torch.zeros(8, 4, 3, 3)
    for grad, reason in (
        (torch.zeros_like(weight).bfloat16(), "torch.bfloat16"),
        (torch.zeros_like(weight, memory_format=torch.channels_last), "strides"),
    ):
        with pytest.raises(ValueError, match=f"cannot add the decay: .*{reason}"):
            triton_kernels.add_decay_(grad, weight, 2, 4, 0.1)
