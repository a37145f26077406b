"""N:M pruning in one pass over the weights, and SR-STE's decay, as Triton kernels; import it only where triton is.

They follow `reference` bit for bit: the same ranking of integer keys, and no fused multiply-add.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.nm import bits_dtype

_ROWS, _COLUMNS = 32, 32  # of a tile; multiples of every m that `obstacle` allows
_UNWANTED, _LIKE_WEIGHT, _TRANSPOSED = range(3)  # what is made of the backward operand


def obstacle(weight: Tensor, m: int, *, backward: bool) -> str | None:
    """Why the kernels cannot prune `weight`, or None if they can.

    Args:
        weight: [out, in / groups, ...], of a linear or convolution layer.
        m: size of a group.
        backward: whether the backward operand is wanted, too.
    """
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{weight.dtype}"
    if m not in (2, 4, 8, 16):
        return f"m={m} is not 2, 4, 8 or 16"
    if _layout(weight) is None:
        return f"strides {weight.stride()} are neither contiguous nor channels_last"
    if weight.shape[1] % m or (backward and weight.shape[0] % m):
        return f"the shape {tuple(weight.shape)} is not divisible by {m}"
    return None


def prune_(weight: Tensor, n: int, m: int, forward: Tensor, backward: Tensor | None) -> None:
    """Write M_f * weight into `forward` and M_b * weight into `backward` in one pass, as `reference.prune_`.

    Args:
        weight: [out, in / groups, ...], without an `obstacle`.
        n: kept per group.
        m: size of a group.
        forward: of the weight's shape and strides, of float32, float16 or bfloat16.
        backward: the same, or None.
    """
    way = _UNWANTED if backward is None else _LIKE_WEIGHT
    _launch(weight, n, m, forward, forward if backward is None else backward, way)


def prune_dual_t(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M_f * weight, [out, in], and (M_b * weight)^T, [in, out], both contiguous, in one pass.

    Args:
        weight: [out, in], without an `obstacle`.
        n: kept per group.
        m: size of a group.
        dtype: of the results.
    """
    forward = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    backward_t = torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device)
    _launch(weight, n, m, forward, backward_t, _TRANSPOSED)
    return forward, backward_t


def add_decay_(grad: Tensor, weight: Tensor, n: int, m: int, decay: float) -> None:
    """Do grad += decay * (1 - M_f) * weight in place and one pass, the product rounded before the sum.

    It is `reference.add_decay_` of the weight's present mask.

    Args:
        grad: of the weight's shape and strides, float32.
        weight: [out, in / groups, ...] without an `obstacle`, float32.
        n: kept per group.
        m: size of a group.
        decay: SR-STE's lambda.
    """
    if reason := decay_obstacle(grad, weight, m):
        raise ValueError(f"The Triton kernel cannot add the decay: {reason}. Use `reference.add_decay_`.")
    grid, sizes = _tiles(weight)
    _add_decay[grid](
        grad, weight.view(torch.int32), weight, decay, *sizes, n,
        m, _ROWS, _COLUMNS, torch.iinfo(torch.int32).max, enable_fp_fusion=False,
    )  # fmt: skip


def decay_obstacle(grad: Tensor, weight: Tensor, m: int) -> str | None:
    """Why the kernel cannot add the decay to `grad`, or None if it can."""
    if not grad.dtype == weight.dtype == torch.float32:
        return f"a gradient of {grad.dtype} and a weight of {weight.dtype}, not both of torch.float32"
    if grad.stride() != weight.stride():
        return f"a gradient of strides {grad.stride()}, a weight of {weight.stride()}"
    return obstacle(weight, m, backward=False)


def _launch(weight: Tensor, n: int, m: int, forward: Tensor, backward: Tensor, way: int) -> None:
    if reason := obstacle(weight, m, backward=way != _UNWANTED):
        raise ValueError(f"The Triton kernel cannot prune this weight: {reason}. Use `reference.prune_`.")
    integer = bits_dtype(weight.dtype)
    to_bfloat16 = weight.dtype == torch.float32 and forward.dtype == torch.bfloat16
    operands = [operand.view(torch.int16) if to_bfloat16 else operand for operand in (forward, backward)]
    grid, sizes = _tiles(weight)
    _prune[grid](
        weight.view(integer), weight, *operands, *sizes, n,
        m, _ROWS, _COLUMNS, torch.iinfo(integer).max, way, to_bfloat16, enable_fp_fusion=False,
    )  # fmt: skip


def _layout(weight: Tensor) -> tuple[int, int] | None:
    """The strides of an input channel and of a place in the kernel; None if these places are in no even order."""
    positions = math.prod(weight.shape[2:])
    if weight.is_contiguous():
        return positions, 1
    last = weight.movedim(1, -1)
    return (1, weight.shape[1]) if last.is_contiguous() else None


def _tiles(weight: Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int, int]]:
    """The grid of a kernel, and the sizes and strides that it takes."""
    layout = _layout(weight)
    assert layout is not None
    out, inner = weight.shape[:2]
    columns = math.prod(weight.shape[1:])
    return (triton.cdiv(out, _ROWS), triton.cdiv(columns, _COLUMNS)), (out, columns, inner, *layout)


@triton.jit
def _keep(keys, n, M: tl.constexpr):
    """The mask of groups in the last dimension; keys: [groups, M], integers."""
    place = tl.arange(0, M)
    mine, other = keys[:, :, None], keys[:, None, :]
    before = (place[None, :] < place[:, None])[None, :, :]
    rank = tl.sum(((other > mine) | ((other == mine) & before)).to(tl.int32), axis=2)
    return rank < n


@triton.jit
def _keep_forward(keys, n, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The mask of groups of neighbours in a row; keys: [R, C]."""
    return tl.reshape(_keep(tl.reshape(keys, (R * C // M, M)), n, M), (R, C))


@triton.jit
def _place(out, columns, inner, channel_stride, position_stride, R: tl.constexpr, C: tl.constexpr):
    """Rows and columns of this tile, where its weights lie, and which of them there are.

    A column is a place in the kernel and an input channel, the channels of one place side by side. Whole groups lie
    inside or outside, because M divides the input channels, and the rows where groups run along them.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    of_column = (column % inner) * channel_stride + (column // inner) * position_stride
    offset = row[:, None].to(tl.int64) * columns + of_column[None, :]
    return row, column, offset, (row[:, None] < out) & (column[None, :] < columns)


@triton.jit
def _bfloat16_bits(value):
    """Of float32, rounded to nearest even by hand: Triton's interpreter cuts the digits off."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _cast(value, pointer, TO_BFLOAT16: tl.constexpr):
    return _bfloat16_bits(value) if TO_BFLOAT16 else value.to(pointer.dtype.element_ty)


@triton.jit
def _prune(
    bits_ptr, weight_ptr, forward_ptr, backward_ptr, out, columns, inner, channel_stride, position_stride, n,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, MAGNITUDE: tl.constexpr, BACKWARD: tl.constexpr,
    TO_BFLOAT16: tl.constexpr,
):  # fmt: skip
    row, column, offset, inside = _place(out, columns, inner, channel_stride, position_stride, R, C)
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
    keys = tl.load(bits_ptr + offset, mask=inside, other=0).to(tl.int32) & MAGNITUDE
    forward = tl.where(_keep_forward(keys, n, M, R, C), weight, 0.0)
    tl.store(forward_ptr + offset, _cast(forward, forward_ptr, TO_BFLOAT16), mask=inside)
    if BACKWARD > 0:
        backward = tl.where(tl.trans(_keep_forward(tl.trans(keys), n, M, C, R)), weight, 0.0)
        backward = _cast(backward, backward_ptr, TO_BFLOAT16)
        if BACKWARD == 1:
            tl.store(backward_ptr + offset, backward, mask=inside)
        else:
            offset_t = column[:, None].to(tl.int64) * out + row[None, :]
            tl.store(backward_ptr + offset_t, tl.trans(backward), mask=tl.trans(inside))


@triton.jit
def _add_decay(
    grad_ptr, bits_ptr, weight_ptr, decay, out, columns, inner, channel_stride, position_stride, n,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    _, _, offset, inside = _place(out, columns, inner, channel_stride, position_stride, R, C)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
    keys = tl.load(bits_ptr + offset, mask=inside, other=0).to(tl.int32) & MAGNITUDE
    pruned = tl.where(_keep_forward(keys, n, M, R, C), 0.0, weight)
    tl.store(grad_ptr + offset, grad + pruned * decay, mask=inside)
