"""Compares the Triton kernels with the reference: `python triton_claims.py cpu` under TRITON_INTERPRET=1, or `cuda`.

`python triton_claims.py compile` makes their machine code for a GPU of $CAPABILITY.
"""

import math
import os
import sys

import torch
from torch import Tensor

from sparsetrain.ops import reference, triton_kernels

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1e-5])
LAST = torch.channels_last
PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8), (1, 2), (2, 16))
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)


def rough(*shape: int) -> Tensor:
    special = SPECIAL[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < 0.5, special, torch.randn(shape))


def bits(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.cpu().float(), nan=12345.0).view(torch.int32)  # which NaN it is does not matter


def check(weight: Tensor, compute: torch.dtype, n: int, m: int, device: str, *, directions: int) -> None:
    """`prune_` in one direction or both."""
    expected, found = ([torch.empty_like(weight, dtype=compute) for _ in range(directions)] for _ in range(2))
    found = [operand.to(device) for operand in found]
    assert all(operand.stride() == weight.stride() for operand in found)
    reference.prune_(weight, n, m, **dict(zip(("forward", "backward"), expected, strict=False)))
    triton_kernels.prune_(weight.to(device), n, m, *found, *[None] * (2 - directions))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(bits(one), bits(other)), (weight.shape, weight.stride(), weight.dtype, compute, n, m)


def check_prune(device: str) -> None:
    for dtype, compute in DTYPES:
        for n, m in PATTERNS:
            weight = rough(*((48, 80) if m < 5 else (16, 32))).to(dtype)
            check(weight, compute, n, m, device, directions=2)
            forward, backward = torch.empty_like(weight, dtype=compute), torch.empty_like(weight, dtype=compute)
            reference.prune_(weight, n, m, forward=forward, backward=backward)
            result = triton_kernels.prune_dual_t(weight.to(device), n, m, compute)
            assert torch.equal(bits(result[0]), bits(forward)), (dtype, compute, n, m)
            assert torch.equal(bits(result[1]), bits(backward.t().contiguous())), (dtype, compute, n, m)
    check(rough(10, 36), torch.float32, 2, 4, device, directions=1)  # a head: groups along its inputs only
    for shape in ((16, 12, 3, 3), (8, 24, 1, 1), (32, 8, 5, 2)):
        for layout in (torch.contiguous_format, LAST):
            weight = rough(*shape).contiguous(memory_format=layout)
            for directions in (1, 2):
                check(weight, torch.bfloat16, 2, 4, device, directions=directions)


def check_decay(device: str) -> None:
    for shape, n, m, layout in (
        ((48, 80), 2, 4, torch.contiguous_format),
        ((10, 40), 1, 8, torch.contiguous_format),
        ((16, 12, 3, 3), 2, 4, torch.contiguous_format),
        ((16, 12, 3, 3), 2, 4, LAST),
    ):
        weight, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
        result = grad.to(device, copy=True)
        triton_kernels.add_decay_(result, weight.to(device), n, m, 2e-4)
        reference.add_decay_(grad, weight, reference.nm_mask(weight, n, m), 2e-4)
        assert torch.equal(result.cpu(), grad), (shape, n, m, layout)


def compile_all(capability: int) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def check(kernel: object, pointers: dict[str, str], decay: dict[str, str], **constants: int) -> None:
        numbers = dict.fromkeys(("out", "columns", "inner", "channel_stride", "position_stride", "n"), "i32")
        signature = {**pointers, **decay, **numbers, **dict.fromkeys(constants, "constexpr")}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = compile(
            ASTSource(kernel, signature, places),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )
        assert made.asm["cubin"]

    tile = {"R": triton_kernels._ROWS, "C": triton_kernels._COLUMNS}
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for weight, compute in DTYPES:
        integer, magnitude = ("i32", 2**31 - 1) if weight == torch.float32 else ("i16", 2**15 - 1)
        to_bfloat16 = weight == torch.float32 and compute == torch.bfloat16
        operand = "*i16" if to_bfloat16 else f"*{short[compute]}"
        pointers = {"bits_ptr": f"*{integer}", "weight_ptr": f"*{short[weight]}"}
        pointers |= {"forward_ptr": operand, "backward_ptr": operand}
        for way in range(3):
            constants = {"M": 4, **tile, "MAGNITUDE": magnitude, "BACKWARD": way, "TO_BFLOAT16": to_bfloat16}
            check(triton_kernels._prune, pointers, {}, **constants)
    pointers = {"grad_ptr": "*fp32", "bits_ptr": "*i32", "weight_ptr": "*fp32"}
    check(triton_kernels._add_decay, pointers, {"decay": "fp32"}, M=16, **tile, MAGNITUDE=2**31 - 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "compile":
        compile_all(int(os.environ["CAPABILITY"]))
        print("compiled")
    else:
        check_prune(sys.argv[1])
        check_decay(sys.argv[1])
        print("equal")
