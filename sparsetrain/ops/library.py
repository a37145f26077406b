"""The pruning of weights as operators of torch.library, so that `torch.compile` sees one opaque node each."""

import torch
from torch import Tensor

from sparsetrain.ops import reference
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
