"""Pruning, compression and sparse products as operators of torch.library, opaque to `torch.compile`."""

import functools
import importlib.util
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from sparsetrain.ops import cusparselt, reference
from sparsetrain.transposable import best_tiles


@torch.no_grad()
def prune_(weight: Tensor, n: int, m: int, *, forward: Tensor, backward: Tensor | None) -> None:
    """Write M_f * weight into `forward` and M_b * weight into `backward`: `reference.prune_`, on a GPU by one kernel.

    Args:
        weight: [out, in / groups, ...].
        n: kept per group.
        m: size of a group.
        forward: of the weight's shape and strides, and of any float dtype of 16, 32 or 64 bits.
        backward: the same; None: not wanted.
    """
    weight, kernels = weight.detach(), _kernels(weight.device)
    fits = forward.dtype != torch.float64 and forward.stride() == weight.stride()
    if kernels is not None and fits and kernels.obstacle(weight, m, backward=backward is not None) is None:
        with _current(weight):
            kernels.prune_(weight, n, m, forward, backward)
    else:
        reference.prune_(weight, n, m, forward=forward, backward=backward)


@torch.no_grad()
def add_decay_(grad: Tensor, weight: Tensor, n: int, m: int, decay: float) -> None:
    """Do grad += decay * (1 - M_f) * weight in place (SR-STE): `reference.add_decay_`, on a GPU by one kernel."""
    weight, kernels = weight.detach(), _kernels(weight.device)
    if kernels is not None and kernels.decay_obstacle(grad, weight, m) is None:
        with _current(weight):
            kernels.add_decay_(grad, weight, n, m, decay)
    else:
        reference.add_decay_(grad, weight, reference.nm_mask(weight, n, m), decay)


def _kernels(device: torch.device) -> ModuleType | None:
    """`triton_kernels` for tensors on a GPU, where triton is installed."""
    return _triton_kernels() if device.type == "cuda" else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from sparsetrain.ops import triton_kernels

    return triton_kernels


def _current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which triton launches."""
    return torch.cuda.device(tensor.device)


@torch.library.custom_op("sparsetrain::prune", mutates_args=())
def prune(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """M_f * weight, cast to `dtype`; shape and strides of `weight`."""
    forward = torch.empty_like(weight, dtype=dtype)
    prune_(weight, n, m, forward=forward, backward=None)
    return forward


@prune.register_fake
def _(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@torch.library.custom_op("sparsetrain::prune_dual", mutates_args=())
def prune_dual(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M_f * weight and M_b * weight, cast to `dtype`; shape and strides of `weight`."""
    forward = torch.empty_like(weight, dtype=dtype)
    backward = torch.empty_like(forward)
    prune_(weight, n, m, forward=forward, backward=backward)
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
    weight, kernels = weight.contiguous(), _kernels(weight.device)
    if kernels is not None and kernels.obstacle(weight, m, backward=True) is None:
        with _current(weight):
            operands: tuple[Tensor, Tensor] = kernels.prune_dual_t(weight, n, m, dtype)
            return operands
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
def spmm(compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int = 0) -> Tensor:
    """The product x @ A^T + bias, [tokens, rows]; compressed: of A [rows, k], x: [tokens, k], bias: [rows].

    `algorithm` is cuSPARSELt's, and has no meaning on a CPU.
    """
    return torch.nn.functional.linear(x, compressed, bias)


@spmm.register_kernel("cuda")
def _(compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int = 0) -> Tensor:
    return cusparselt.matmul(compressed, x, bias, algorithm=algorithm).contiguous()


@spmm.register_fake
def _(compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int = 0) -> Tensor:
    return x.new_empty(x.shape[0], compressed.shape[0])
