"""Compares the Triton kernels with the reference: `python triton_claims.py cpu` under TRITON_INTERPRET=1, or `cuda`."""

import math
import sys

import torch

from sparsetrain.masks import unpack
from sparsetrain.ops import reference, triton_kernels

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1e-5])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(tensor.float(), nan=12345.0).view(torch.int32)  # which NaN it is does not matter


def check_prune(device: str) -> None:
    for dtype, compute in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        for n, m in ((2, 4), (1, 4), (2, 8), (4, 8), (1, 2), (2, 16)):
            shape = (48, 80) if m < 5 else (16, 32)
            rough = SPECIAL[torch.randint(len(SPECIAL), shape)]
            weight = torch.where(torch.rand(shape) < 0.5, rough, torch.randn(shape)).to(dtype)
            result = [tensor.cpu() for tensor in triton_kernels.prune_dual(weight.to(device), n, m, compute)]
            forward, backward = torch.empty(shape, dtype=compute), torch.empty(shape, dtype=compute)
            reference.prune_(weight, n, m, forward=forward, backward=backward)
            assert torch.equal(bits(result[0]), bits(forward)), (dtype, compute, n, m, "forward")
            assert torch.equal(bits(result[1]), bits(backward.t().contiguous())), (dtype, compute, n, m, "backward")
            assert torch.equal(unpack(result[2].flatten(), weight.shape), reference.nm_mask(weight, n, m, 1))
            assert torch.equal(unpack(result[3].flatten(), weight.shape), reference.nm_mask(weight, n, m, 0))


def check_decay(device: str) -> None:
    weight, grad = torch.randn(48, 80), torch.randn(48, 80)
    packed = triton_kernels.prune_dual(weight.to(device), 2, 4, torch.bfloat16)[2]
    result = grad.to(device, copy=True)
    triton_kernels.add_decay_(result, weight.to(device), packed, 2e-4)
    reference.add_decay_(grad, weight, reference.nm_mask(weight, 2, 4), 2e-4)
    assert torch.equal(result.cpu(), grad)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_prune(sys.argv[1])
    check_decay(sys.argv[1])
    print("equal")
