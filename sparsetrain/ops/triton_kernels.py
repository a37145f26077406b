"""N:M pruning in one pass over the weights, and SR-STE's decay, as Triton kernels; import it only where triton is.

They follow `reference` bit for bit: the same ranking of integer keys, and no fused multiply-add.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.nm import bits_dtype

_ROWS, _COLUMNS = 32, 32  # of a tile; multiples of every m that `supports` allows
_FLAT = 1024


def supports(weight: Tensor, n: int, m: int) -> str | None:
    """Why the kernels cannot prune `weight`, or None if they can."""
    if weight.dim() != 2 or not weight.is_contiguous():
        return "the weight is not a contiguous matrix"
    if m not in (2, 4, 8, 16):
        return f"m={m} is not 2, 4, 8 or 16"
    if weight.shape[0] % m or weight.shape[1] % m or weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"the shape {tuple(weight.shape)} is not divisible by {max(m, 8)}"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{weight.dtype}"
    return None


def prune_dual(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both pruned operands and both masks in one pass.

    Args:
        weight: [out, in], as `supports` allows.
        n: kept per group.
        m: size of a group.
        dtype: of the operands.

    Returns:
        M_f * W, [out, in]; (M_b * W)^T, [in, out], contiguous; and M_f and M_b packed along a row of W, uint8
        [out, in / 8], as `masks.pack` does it: the first weight in the highest bit.
    """
    if reason := supports(weight, n, m):
        raise ValueError(f"The Triton kernel cannot prune this weight: {reason}. Use `reference.prune_`.")
    out, inner = weight.shape
    forward = torch.empty(out, inner, dtype=dtype, device=weight.device)
    backward_t = torch.empty(inner, out, dtype=dtype, device=weight.device)
    masks = [torch.empty(out, inner // 8, dtype=torch.uint8, device=weight.device) for _ in range(2)]
    grid = (triton.cdiv(out, _ROWS), triton.cdiv(inner, _COLUMNS))
    integer = bits_dtype(weight.dtype)
    to_bfloat16 = weight.dtype == torch.float32 and dtype == torch.bfloat16
    operands = [operand.view(torch.int16) if to_bfloat16 else operand for operand in (forward, backward_t)]
    _prune_dual[grid](
        weight.view(integer), weight, *operands, *masks, out, inner, n,
        m, _ROWS, _COLUMNS, torch.iinfo(integer).max, to_bfloat16,
    )  # fmt: skip
    return forward, backward_t, masks[0], masks[1]


def add_decay_(grad: Tensor, weight: Tensor, mask: Tensor, decay: float) -> None:
    """Do grad += decay * (1 - mask) * weight in place, the product rounded before the sum, as `reference.add_decay_`.

    Args:
        grad: contiguous, float32.
        weight: of the same shape, contiguous, float32.
        mask: uint8, 8 weights a byte in row-major order, the first weight in the highest bit.
        decay: SR-STE's lambda.
    """
    if not (grad.is_contiguous() and weight.is_contiguous() and grad.dtype == weight.dtype == torch.float32):
        raise ValueError(
            f"The Triton decay needs contiguous float32 tensors; got {grad.dtype} with strides {grad.stride()} and "
            f"{weight.dtype} with strides {weight.stride()}. Use `reference.add_decay_`."
        )
    size = grad.numel()
    _add_decay[(triton.cdiv(size, _FLAT),)](grad, weight, mask, decay, size, _FLAT, enable_fp_fusion=False)


@triton.jit
def _keep(keys, n, M: tl.constexpr):
    """The mask of groups in the last dimension; keys: [groups, M], integers."""
    place = tl.arange(0, M)
    mine, other = keys[:, :, None], keys[:, None, :]
    before = (place[None, :] < place[:, None])[None, :, :]
    rank = tl.sum(((other > mine) | ((other == mine) & before)).to(tl.int32), axis=2)
    return rank < n


@triton.jit
def _pack(keep, R: tl.constexpr, C: tl.constexpr):
    """Eight neighbours of a row in a byte, as `masks.pack`; keep: [R, C]."""
    bits = tl.reshape(keep.to(tl.int32), (R, C // 8, 8)) << (7 - tl.arange(0, 8))[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def _bfloat16_bits(value):
    """Of float32, rounded to nearest even by hand: Triton's interpreter cuts the digits off."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _prune_dual(
    bits_ptr, weight_ptr, forward_ptr, backward_t_ptr, mask_f_ptr, mask_b_ptr, out, inner, n,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, MAGNITUDE: tl.constexpr,
    TO_BFLOAT16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    offset = row[:, None].to(tl.int64) * inner + column[None, :]
    # Whole groups lie inside or outside of the matrix, because both sizes are divisible by M.
    inside = (row[:, None] < out) & (column[None, :] < inner)
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
    keys = tl.load(bits_ptr + offset, mask=inside, other=0).to(tl.int32) & MAGNITUDE
    keep_f = tl.reshape(_keep(tl.reshape(keys, (R * C // M, M)), n, M), (R, C))
    keep_b = tl.trans(tl.reshape(_keep(tl.reshape(tl.trans(keys), (R * C // M, M)), n, M), (C, R)))
    forward, backward = tl.where(keep_f, weight, 0.0), tl.where(keep_b, weight, 0.0)
    if TO_BFLOAT16:
        forward, backward = _bfloat16_bits(forward), _bfloat16_bits(backward)
    else:
        dtype = forward_ptr.dtype.element_ty
        forward, backward = forward.to(dtype), backward.to(dtype)
    tl.store(forward_ptr + offset, forward, mask=inside)
    offset_t = column[:, None].to(tl.int64) * out + row[None, :]
    tl.store(backward_t_ptr + offset_t, tl.trans(backward), mask=tl.trans(inside))
    byte = tl.program_id(1) * (C // 8) + tl.arange(0, C // 8)
    offset_8 = row[:, None].to(tl.int64) * (inner // 8) + byte[None, :]
    inside_8 = (row[:, None] < out) & (byte[None, :] < inner // 8)
    tl.store(mask_f_ptr + offset_8, _pack(keep_f, R, C), mask=inside_8)
    tl.store(mask_b_ptr + offset_8, _pack(keep_b, R, C), mask=inside_8)


@triton.jit
def _add_decay(grad_ptr, weight_ptr, mask_ptr, decay, size, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < size
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
    byte = tl.load(mask_ptr + place // 8, mask=inside, other=0).to(tl.int32)
    pruned = ((byte >> (7 - place % 8).to(tl.int32)) & 1) == 0
    tl.store(grad_ptr + place, grad + tl.where(pruned, weight, 0.0) * decay, mask=inside)
