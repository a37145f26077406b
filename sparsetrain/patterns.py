"""Which shapes a mask may have."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.nm import check_nm, keep_largest
from sparsetrain.topk import mask_largest
from sparsetrain.transposable import best_tiles


class Pattern(ABC):
    """Turns scores and a count into a mask of an allowed shape; a frozen dataclass."""

    @abstractmethod
    def reachable(self, shape: torch.Size, kept: int) -> int:
        """The count nearest to `kept`, in [0, shape.numel()], that the pattern can express in a tensor of `shape`.

        Raises:
            ValueError: the pattern does not fit the shape; with the remedy.
        """

    @abstractmethod
    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        """The mask of the best scores.

        Args:
            score: any shape, finite, -inf where a weight may not be kept; larger = keep.
            kept: a reachable count.
            cut: the smallest kept score, if it is known: a hint.

        Returns:
            Bool mask of the same shape with `kept` True; among equal scores the lower row-major index is kept.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may be pruned."""

    def reachable(self, shape: torch.Size, kept: int) -> int:
        return kept

    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        return mask_largest(score, kept, cut)


@dataclass(frozen=True)
class NM(Pattern):
    """Exactly n of every m consecutive weights along one axis of [out, in, ...]; so there is one count for a shape.

    Groups of a convolution weight run along that axis at a fixed kernel position, as sparse tensor cores and NHWC
    layouts have them.

    Args:
        n: kept per group.
        m: size of a group.
        axis: 1, the input dimension (the sum of the forward product), or 0, the output dimension (of the backward).

    >>> NM(2, 4).mask(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), kept=2).int()
    tensor([[0, 1, 1, 0]], dtype=torch.int32)
    """

    n: int = 2
    m: int = 4
    axis: int = 1

    def __post_init__(self) -> None:
        check_nm(self.n, self.m)
        if self.axis not in (0, 1):
            raise ValueError(f"axis={self.axis} of NM must be 1 (the input dimension) or 0 (the output dimension).")

    def reachable(self, shape: torch.Size, kept: int) -> int:
        _check_divisible(self, shape, (self.axis,), self.m)
        return shape.numel() // self.m * self.n

    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        return keep_largest(score, self.n, self.m, self.axis) if score.numel() else score.bool()


@dataclass(frozen=True)
class TransposableNM(Pattern):
    """One mask with n of m in every row and column of every m x m tile of [out, in, ...], keeping the best sum.

    It is exact, by trying all patterns of a tile: 90 for 2:4. Tiles lie at fixed kernel positions.

    Args:
        n: kept in each row and column of a tile.
        m: size of a tile, at most 5; larger ones have too many patterns to try (4:8 has 10^11).

    Source: Hubara et al. 2021, arXiv:2102.08124. Differs: the optimum, where they have a 2-approximation for speed.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_nm(self.n, self.m)
        if self.m > 5:
            raise ValueError(f"m={self.m} of TransposableNM must be at most 5: all patterns are tried. Take n=2, m=4.")

    def reachable(self, shape: torch.Size, kept: int) -> int:
        _check_divisible(self, shape, (0, 1), self.m)
        return shape.numel() // self.m * self.n

    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        return best_tiles(score, self.n, self.m) if score.numel() else score.bool()


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output or input channels of [out, in, ...]; the best are those with the largest sum of scores.

    With `Magnitude` the sum is the L1 norm of a channel's weights. The count is rounded to whole channels in each
    tensor; of one that is to keep anything, a channel stays. In a transposed convolution axis 0 is the input.

    Only weights are masked: a pruned output channel still emits its bias, or what batch norm makes of zeros, which a
    network that is to become smaller has to account for; see `sparsetrain.export.shrink`. A pruned input channel is
    not read at all, so that removing it never changes what the network computes.

    Args:
        axis: 0, output channels (filters), or 1, input channels.

    Source: Li et al. 2017, arXiv:1608.08710, section 3: filters with the smallest L1 norms are pruned.
    Differs: they choose a share for each layer and rank its filters; here the allocation gives each tensor its share,
        and ranks single weights unless it is `Uniform` or `ERK`. They remove filters at once with their feature maps.

    >>> Channel().mask(torch.tensor([[1.0, 1.0], [0.0, 3.0], [2.0, 0.0]]), kept=2).int()
    tensor([[0, 0],
            [1, 1],
            [0, 0]], dtype=torch.int32)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise ValueError(f"axis={self.axis} of Channel must be 0 (output channels) or 1 (input channels).")

    def reachable(self, shape: torch.Size, kept: int) -> int:
        if len(shape) < 2:
            raise ValueError(f"{self} needs weights of at least 2 dimensions; got {tuple(shape)}. Add it to `exclude`.")
        if not shape.numel():
            return 0
        size = shape.numel() // shape[self.axis]
        return max((kept + size // 2) // size, min(kept, 1)) * size

    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        others = [dim for dim in range(score.dim()) if dim != self.axis]
        best = mask_largest(score.double().sum(others), kept * score.shape[self.axis] // max(score.numel(), 1))
        rows = best.view([-1 if dim == self.axis else 1 for dim in range(score.dim())])
        return torch.empty_like(score, dtype=torch.bool).copy_(rows)


def _check_divisible(pattern: Pattern, shape: torch.Size, axes: tuple[int, ...], m: int) -> None:
    for axis in axes:
        if len(shape) < 2 or shape[axis] % m:
            side = ("output", "input")[axis]
            raise ValueError(
                f"{pattern} needs an {side} dimension (axis {axis}) divisible by {m}; got shape {tuple(shape)}. "
                "Add it to `exclude`."
            )
