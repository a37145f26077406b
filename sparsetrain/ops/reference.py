"""What an N:M layer computes, in plain torch: the definition that every faster backend must equal.

    y  = x @ W_f^T + b       W_f = M_f * W, n of every m kept along the input dimension (axis 1)
    dx = g @ W_b             W_b = M_b * W, n of every m kept along the output dimension (axis 0)
    dW = g^T @ x             dense: the optimizer updates every weight
    db = sum(g)

Kept are the largest |w| by their bit pattern as an integer, ties to the lower index: exactly n of every m, also among
zeros, infinities and NaN. Convolution weights [out, in / groups, kh, kw] have their groups at a fixed kernel position.

Source: Fang et al. 2023 (BDWP), arXiv:2309.13015; sparsity along the reduction axis of each product.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.nm import bits_dtype, chunks, in_memory_order, keep_largest, keep_largest_, magnitude_bits, scratch

FORWARD_AXIS, BACKWARD_AXIS = 1, 0  # the axis of [out, in, ...] that the product sums over


def nm_mask(weight: Tensor, n: int, m: int, axis: int = FORWARD_AXIS) -> Tensor:
    """True at the `n` largest |w| of every `m` consecutive places along `axis`.

    Args:
        weight: [out, in / groups, ...], its size along `axis` divisible by m; float64, float32, float16 or bfloat16.
        n: kept per group.
        m: size of a group.
        axis: 1 for the mask of the forward product, 0 for that of the input gradient.

    Returns:
        Bool mask of the weight's shape and memory format.
    """
    return keep_largest(magnitude_bits(weight), n, m, axis)


def masked(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`weight` where `mask` is True and +0.0 elsewhere (multiplying would keep NaN, and make -0.0), cast to `dtype`."""
    out = torch.empty_like(weight, dtype=dtype)
    masked_(out, weight, mask)
    return out


def masked_(out: Tensor, weight: Tensor, mask: Tensor) -> None:
    """Write `masked` into `out`, in its dtype; of the weight's shape and strides."""
    (weight, mask, out), _ = in_memory_order([weight, mask, out], 0)
    for rows in chunks(weight, 1):
        spoiled = scratch("mask", mask[rows].shape, torch.bool, mask.device).copy_(mask[rows])
        _write_masked(out[rows], weight[rows].to(out.dtype), spoiled)


@torch.no_grad()
def prune_(weight: Tensor, n: int, m: int, *, forward: Tensor | None = None, backward: Tensor | None = None) -> None:
    """Write M_f * weight into `forward` and M_b * weight into `backward`, reading the weight once.

    Args:
        weight: [out, in / groups, ...].
        n: kept per group.
        m: size of a group.
        forward: of the weight's shape and strides, and of any float dtype of 16, 32 or 64 bits; None: not wanted.
        backward: the same.
    """
    asked = [(out, axis) for out, axis in ((forward, FORWARD_AXIS), (backward, BACKWARD_AXIS)) if out is not None]
    outs = [in_memory_order([weight.detach(), out], axis) for out, axis in asked]
    # The chunks must hold whole groups of either axis, whichever of the two comes first in memory.
    for rows in chunks(outs[0][0][0], m) if outs else ():
        part = outs[0][0][0][rows]
        keys = magnitude_bits(part, scratch("keys", part.shape, bits_dtype(part.dtype), part.device))
        mask, values = scratch("mask", part.shape, torch.bool, part.device), part
        for (_, out), axis in outs:
            keep_largest_(mask, keys, n, m, axis)
            if values.dtype != out.dtype:
                values = scratch("values", part.shape, out.dtype, part.device).copy_(part)
            _write_masked(out[rows], values, mask)


@torch.no_grad()
def add_decay_(grad: Tensor, weight: Tensor, mask: Tensor, decay: float) -> None:
    """Do grad += decay * (1 - mask) * weight in place (SR-STE), the product rounded before the sum.

    Args:
        grad: of the weight's shape; unscaled, and once per optimizer step.
        weight: the dense master.
        mask: bool, True = kept: M_f.
        decay: lambda, at least 0.

    Source: Zhou et al. 2021, arXiv:2102.04010.
    """
    grad.add_(masked(weight.detach(), ~mask).mul_(decay))


def _write_masked(out: Tensor, values: Tensor, mask: Tensor) -> None:
    """Write `values` where `mask` is True, else +0.0, by bits; spoils `mask`."""
    integer = bits_dtype(out.dtype)
    all_bits = scratch("bits", mask.shape, integer, mask.device).copy_(mask.view(torch.int8).neg_())  # -1: every bit
    torch.bitwise_and(values.view(integer), all_bits, out=out.view(integer))


def linear_forward(x: Tensor, forward_weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product y = x @ W_f^T + b; x: [..., in], W_f: [out, in], y: [..., out]."""
    return F.linear(x, forward_weight, bias)


def linear_backward(
    g: Tensor, x: Tensor, backward_weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The products dx = g @ W_b and dW = g^T @ x, and db = sum(g), each if `needs` it; g [..., out], x [..., in]."""
    rows = g.reshape(-1, g.shape[-1])
    dx = (rows @ backward_weight).view(x.shape) if needs[0] else None
    dw = (rows.t() @ x.reshape(-1, x.shape[-1])) if needs[1] else None
    db = rows.sum(0) if needs[2] else None
    return dx, dw, db


def conv_forward(
    x: Tensor,
    forward_weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of x with W_f; x: [batch, in, height, width], W_f: [out, in / groups, kh, kw]."""
    return torch.conv2d(x, forward_weight, bias, list(stride), list(padding), list(dilation), groups)


def conv_backward(
    g: Tensor,
    x: Tensor,
    backward_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The transposed convolution of g with W_b, the correlation of g with x, and the sum of g, each if `needs` it."""
    # Only dx depends on the weight that is passed; dW takes its shape.
    dx, dw, db = torch.ops.aten.convolution_backward(
        g,
        x,
        backward_weight,
        [g.shape[1]],
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0, 0],
        groups,
        list(needs),
    )
    return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None
