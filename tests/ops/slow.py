"""Independent, slow definitions that the tests of `ops` compare with."""

import struct
from itertools import product

import torch
from torch import Tensor


def group_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """N of m by sorting each group in Python, on (bit pattern of |w|, lower index first)."""
    moved = weight.detach().movedim(axis, -1)
    values = moved.reshape(-1, m)
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for row, group in enumerate(values.tolist()):
        order = sorted(range(m), key=lambda i: (-_bits(group[i]), i))
        mask[row, order[:n]] = True
    return mask.view(moved.shape).movedim(-1, axis)


def _bits(value: float) -> int:
    """Of |value| as float64: in the same order as the bits of the narrower type that it came from."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits & 0x7FFFFFFFFFFFFFFF


def linear(x: Tensor, w_f: Tensor, w_b: Tensor, bias: Tensor | None, g: Tensor) -> tuple[Tensor, ...]:
    """The result y, and dx, dW, db, by einsum over the last dimension."""
    y = torch.einsum("...i,oi->...o", x, w_f)
    y = y if bias is None else y + bias
    dx = torch.einsum("...o,oi->...i", g, w_b)
    dw = torch.einsum("to,ti->oi", g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]))
    return y, dx, dw, g.reshape(-1, g.shape[-1]).sum(0)


def conv2d(
    x: Tensor,
    w_f: Tensor,
    w_b: Tensor,
    bias: Tensor | None,
    g: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Tensor, ...]:
    """The result y, and dx, dW, db, one kernel position after the other; padding is (left, right, top, bottom)."""
    left, right, top, bottom = padding
    padded = torch.nn.functional.pad(x, padding)
    height, width = g.shape[2:]
    y, dw = torch.zeros_like(g), torch.zeros_like(w_f)
    d_padded = torch.zeros_like(padded)
    for row, column in product(range(w_f.shape[2]), range(w_f.shape[3])):
        rows = slice(row * dilation[0], row * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(column * dilation[1], column * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
        for group in range(groups):
            out = slice(group * w_f.shape[0] // groups, (group + 1) * w_f.shape[0] // groups)
            inner = slice(group * w_f.shape[1], (group + 1) * w_f.shape[1])
            seen = padded[:, inner, rows, columns]
            y[:, out] += torch.einsum("bihw,oi->bohw", seen, w_f[out, :, row, column])
            d_padded[:, inner, rows, columns] += torch.einsum("bohw,oi->bihw", g[:, out], w_b[out, :, row, column])
            dw[out, :, row, column] += torch.einsum("bohw,bihw->oi", g[:, out], seen)
    y = y if bias is None else y + bias.view(1, -1, 1, 1)
    dx = d_padded[:, :, top : d_padded.shape[2] - bottom, left : d_padded.shape[3] - right]
    return y, dx, dw, g.sum((0, 2, 3))
