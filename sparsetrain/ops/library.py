"""Pruning, compression and sparse products as operators of torch.library, opaque to `torch.compile`."""

import importlib.util

import torch
from torch import Tensor

from sparsetrain.ops import cusparselt, reference
from sparsetrain.transposable import best_tiles


@torch.library.custom_op("sparsetrain::prune", mutates_args=())
def prune(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """M_f * weight, cast to `dtype`; shape and strides of `weight`."""
    forward = torch.empty_like(weight, dtype=dtype)
    reference.prune_(weight, n, m, forward=forward)
    return forward


@prune.register_fake
def _(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@torch.library.custom_op("sparsetrain::prune_dual", mutates_args=())
def prune_dual(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M_f * weight and M_b * weight, cast to `dtype`; shape and strides of `weight`."""
    forward = torch.empty_like(weight, dtype=dtype)
    backward = torch.empty_like(forward)
    reference.prune_(weight, n, m, forward=forward, backward=backward)
    return forward, backward


@prune_dual.register_fake
def _(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    forward = torch.empty_like(weight, dtype=dtype)
    return forward, torch.empty_like(forward)


@torch.library.custom_op("sparsetrain::prune_transposable", mutates_args=())
def prune_transposable(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """M_t * weight, cast to `dtype`; shape and strides of `weight`."""
    return reference.masked(weight, best_tiles(weight.abs(), n, m), dtype)


@prune_transposable.register_fake
def _(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@torch.library.custom_op("sparsetrain::prune_dual_t", mutates_args=())
def prune_dual_t(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M_f * weight, [out, in], and (M_b * weight)^T, [in, out], both contiguous, cast to `dtype`; weight: [out, in]."""
    if weight.is_cuda and importlib.util.find_spec("triton") is not None:
        from sparsetrain.ops import triton_kernels

        if triton_kernels.supports(weight, n, m) is None:
            with torch.cuda.device(weight.device):  # triton launches on the current one
                return triton_kernels.prune_dual(weight, n, m, dtype)[:2]
    weight = weight.contiguous()
    forward = torch.empty_like(weight, dtype=dtype)
    backward = torch.empty_like(forward)
    reference.prune_(weight, n, m, forward=forward, backward=backward)
    return forward, backward.t().contiguous()


@prune_dual_t.register_fake
def _(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out, inner = weight.shape
    return weight.new_empty(out, inner, dtype=dtype), weight.new_empty(inner, out, dtype=dtype)


@torch.library.custom_op("sparsetrain::compress", mutates_args=(), device_types="cpu")
def compress(pruned: Tensor) -> Tensor:
    """A 2:4 matrix [rows, k] in the form that `spmm` multiplies: opaque; on a CPU the matrix itself."""
    return pruned.contiguous().clone()


@compress.register_kernel("cuda")
def _(pruned: Tensor) -> Tensor:
    return cusparselt.compress(pruned)


@compress.register_fake
def _(pruned: Tensor) -> Tensor:
    shape = cusparselt.compressed_shape(pruned.shape) if pruned.is_cuda else pruned.shape
    return pruned.new_empty(shape)


@torch.library.custom_op("sparsetrain::spmm", mutates_args=(), device_types="cpu")
def spmm(compressed: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product x @ A^T + bias, [tokens, rows]; compressed: of A [rows, k], x: [tokens, k], bias: [rows]."""
    return torch.nn.functional.linear(x, compressed, bias)


@spmm.register_kernel("cuda")
def _(compressed: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return cusparselt.matmul(compressed, x, bias).contiguous()


@spmm.register_fake
def _(compressed: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], compressed.shape[0])
