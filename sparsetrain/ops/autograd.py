"""Linear and convolution whose forward product, input gradient and weight gradient use different weights.

The gradient of the dense master is dense and passes straight through; the input gradient is taken with the backward
weight, which need not be the derivative of the forward product.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.ops import library, reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, forward: Tensor, backward: Tensor) -> Tensor:
    """The product y = x @ forward^T + bias, with dx = g @ backward, dW = g^T @ x to `weight`, and db = sum(g).

    Args:
        x: [..., in]; cast to the dtype of `forward` under autocast, as a plain linear layer would.
        weight: the dense master, [out, in]; it only receives the gradient.
        bias: [out] or None.
        forward: [out, in] in the compute dtype.
        backward: the same.

    Returns:
        [..., out] in the compute dtype. A second derivative is refused.
    """
    x, bias = _as_autocast(x, bias, forward.dtype)
    y: Tensor = _Linear.apply(x, weight, bias, forward, _unless_same(backward, forward))
    return y


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Tensor,
    backward: Tensor,
    *,
    sparse_backward: bool,
    algorithms: tuple[int, int] = (0, 0),
) -> Tensor:
    """The same products as `linear`, by sparse kernels.

    Args:
        x: [..., in].
        weight: the dense master, [out, in] or [out, in, 1, 1]; it only receives the gradient.
        bias: [out] or None.
        forward: `library.compress` of W_f [out, in].
        backward: `library.compress` of W_b^T [in, out] if `sparse_backward`, else W_b itself, dense, [out, in].
        sparse_backward: whether the input gradient is a sparse product too.
        algorithms: cuSPARSELt's of the two products.
    """
    x, bias = _as_autocast(x, bias, forward.dtype)
    y: Tensor = _SparseLinear.apply(x, weight, bias, forward, backward, sparse_backward, algorithms)
    return y


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: Tensor,
    backward: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same for a convolution: x [batch, in, height, width] or without batch, weights [out, in / groups, kh, kw]."""
    x, bias = _as_autocast(x, bias, forward.dtype)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    y: Tensor = _Conv2d.apply(
        batch,
        weight,
        bias,
        forward,
        _unless_same(backward, forward),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    return y if x.dim() == 4 else y.squeeze(0)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a plain layer would multiply `weight` now: autocast's, if it is on and would cast it."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _as_autocast(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What autocast does to the other operands; without autocast a mismatch stays the error that it is."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, bias
    x = x if x.dtype == torch.float64 else x.to(dtype)
    return x, bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)


def _unless_same(backward: Tensor, forward: Tensor) -> Tensor | None:
    # `torch.compile` refuses an autograd.Function that gets one tensor twice.
    return None if backward is forward else backward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forward: Tensor, backward: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, forward if backward is None else backward)
        ctx.weight_dtype = weight.dtype
        return reference.linear_forward(x, forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, backward = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dw, db = reference.linear_backward(g, x, backward, (needs[0], needs[1], needs[2]))
        return dx, dw if dw is None else dw.to(ctx.weight_dtype), db, None, None


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward: Tensor,
        backward: Tensor,
        sparse_backward: bool,
        algorithms: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, backward)
        ctx.weight_dtype, ctx.weight_shape, ctx.sparse_backward = weight.dtype, weight.shape, sparse_backward
        first, ctx.algorithm = algorithms
        y: Tensor = library.spmm(forward, x.reshape(-1, x.shape[-1]), bias, first)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, backward = ctx.saved_tensors
        needs, rows = ctx.needs_input_grad, g.reshape(-1, g.shape[-1])
        dense_dx = needs[0] and not ctx.sparse_backward
        dx, dw, db = reference.linear_backward(g, x, backward, (dense_dx, needs[1], needs[2]))
        if needs[0] and ctx.sparse_backward:
            dx = library.spmm(backward, rows, None, ctx.algorithm).view(x.shape)
        if dw is not None:
            dw = dw.to(ctx.weight_dtype).view(ctx.weight_shape)
        return dx, dw, db, None, None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward: Tensor,
        backward: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, forward if backward is None else backward)
        ctx.weight_dtype = weight.dtype
        ctx.geometry = (stride, padding, dilation, groups)
        return reference.conv_forward(x, forward, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, backward = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dw, db = reference.conv_backward(g, x, backward, *ctx.geometry, needs=(needs[0], needs[1], needs[2]))
        return dx, dw if dw is None else dw.to(ctx.weight_dtype), db, *[None] * 6
