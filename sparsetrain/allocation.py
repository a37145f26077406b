"""How a budget of kept weights is divided among tensors: integers that add up exactly."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrain.topk import Scores, count_largest


@dataclass(frozen=True)
class Candidates:
    """The tensors among which weights are kept.

    Args:
        shapes: of each tensor.
        available: how many weights of each may be kept: all, or where nothing regrows those kept so far.
        scores: makes each tensor's scores, finite, -inf where a weight is not available; larger = keep.
    """

    shapes: Sequence[torch.Size]
    available: Sequence[int]
    scores: Sequence[Scores]

    @property
    def sizes(self) -> list[int]:
        """The number of weights of each tensor."""
        return [shape.numel() for shape in self.shapes]


@dataclass(frozen=True)
class Budget:
    """What an allocation answers.

    Args:
        kept: how many weights each tensor keeps.
        cut: the smallest kept score, where one cut serves the tensors: a hint that spares patterns a search.
    """

    kept: Sequence[int]
    cut: float | None = None


@dataclass(frozen=True)
class Allocation(ABC):
    """Divides a number of kept weights among tensors.

    Args:
        floor: kept in every tensor at least (or all of a smaller one), so that no layer is cut through; 0 allows that.
    """

    floor: int = 1

    def __post_init__(self) -> None:
        if self.floor < 0:
            raise ValueError(f"floor={self.floor} is no number of weights; it must be at least 0.")

    def divide(self, candidates: Candidates, kept: int) -> Budget:
        """Which part of `kept` weights each tensor keeps.

        Args:
            candidates: the tensors.
            kept: in all, at most the available ones.

        Returns:
            Counts that add up to `kept`, between the floor and the available ones in each tensor.

        Raises:
            ValueError: as `check`.
        """
        return self._divide(candidates, kept, self.check(candidates, kept))

    def check(self, candidates: Candidates, kept: int) -> list[int]:
        """How many weights each tensor keeps at least, if `kept` are kept in all; without a look at scores.

        Raises:
            ValueError: the floors alone exceed `kept`.
        """
        low = [min(self._floor(candidates), available) for available in candidates.available]
        if sum(low) > kept:
            size = sum(candidates.sizes)
            limit = math.floor(1e6 * (1 - sum(low) / size)) / 1e6
            raise ValueError(
                f"Only {kept} of {size} weights would be kept, but {self} keeps at least {sum(low)} in {len(low)} "
                f"tensors. The largest sparsity that leaves them is {limit}: lower the sparsity or the floor, or "
                "exclude tensors."
            )
        return low

    def _floor(self, candidates: Candidates) -> int:
        return self.floor

    @abstractmethod
    def _divide(self, candidates: Candidates, kept: int, low: list[int]) -> Budget: ...


@dataclass(frozen=True)
class Global(Allocation):
    """One ranking over all tensors: each keeps what it has among the largest scores.

    Source: Han et al. 2015, arXiv:1506.02626; with a floor Gupta et al. 2022, arXiv:2209.14624 ("minimum threshold"),
    solved exactly: the best scores of all among the choices that leave every tensor its floor.

    Args:
        floor: kept in every tensor at least.
        floor_share: the same as a share, in [0, 1), of all tensors' weights together (0.002 for MobileNetV1 there).
    """

    floor_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.floor_share < 1.0:
            raise ValueError(f"floor_share={self.floor_share} is no share of the weights; it lies in [0, 1).")

    def _floor(self, candidates: Candidates) -> int:
        return max(self.floor, math.floor(self.floor_share * sum(candidates.sizes) + 0.5))

    def _divide(self, candidates: Candidates, kept: int, low: list[int]) -> Budget:
        return _rank_together(candidates.scores, candidates.sizes, kept, low)


@dataclass(frozen=True)
class LAMP(Allocation):
    """One ranking of scores that are relative to their layer: w^2 / sum of v^2 over the v of the layer with |v| >= |w|.

    The largest weight of each layer has score 1, so no layer vanishes. Needs a sort per tensor.
    Source: Lee et al. 2021, arXiv:2010.07931, eq. 3; w is the criterion's score, |w| for `Magnitude`. Dividing raises
    a ValueError if a score is below 0, as those of `Movement` may be.
    """

    def _divide(self, candidates: Candidates, kept: int, low: list[int]) -> Budget:
        rankings = [lambda make=make: _lamp(make()) for make in candidates.scores]
        return Budget(_rank_together(rankings, candidates.sizes, kept, low).kept)


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every tensor, to within one weight."""

    def _divide(self, candidates: Candidates, kept: int, low: list[int]) -> Budget:
        return Budget(_apportion(candidates.sizes, kept, low, candidates.available))


@dataclass(frozen=True)
class ERK(Allocation):
    """Erdos-Renyi-Kernel: density proportional to (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w), at most 1.

    Narrow layers stay denser than wide ones. Source: Evci et al. 2020, arXiv:1911.11134, section 3.1.
    """

    def _divide(self, candidates: Candidates, kept: int, low: list[int]) -> Budget:
        return Budget(_apportion([sum(shape) for shape in candidates.shapes], kept, low, candidates.available))


def _rank_together(rankings: Sequence[Scores], sizes: Sequence[int], kept: int, low: Sequence[int]) -> Budget:
    """The largest scores over all tensors, `low` in each at least.

    A tensor that gets less than its floor is given the floor and leaves the contest; the others then get no more than
    before, so that the set of tensors on their floor only grows and the end is the constrained optimum.
    """
    counts, free = list(low), list(range(len(sizes)))
    while True:
        left = kept - sum(counts[i] for i in range(len(sizes)) if i not in free)
        shares, cut = count_largest([rankings[i] for i in free], [sizes[i] for i in free], left)
        below = {i for i, share in zip(free, shares, strict=True) if share < low[i]}
        if not below:
            break
        free = [i for i in free if i not in below]
    for i, share in zip(free, shares, strict=True):
        counts[i] = share
    return Budget(counts, cut)


def _apportion(weights: Sequence[int], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Integers in [low, high] that add up to `total`, as near to proportional to `weights` as these bounds allow.

    The shares are c * weight, cut off at the bounds, with the one c that fits; then largest remainders, ties to the
    first. In exact fractions, so that all machines agree.
    """
    free, shares = set(range(len(weights))), [Fraction(0)] * len(weights)
    while free:
        left = total - sum(shares[i] for i in range(len(weights)) if i not in free)
        scale = Fraction(left, sum(weights[i] for i in free))
        for i in free:
            shares[i] = scale * weights[i]
        over = {i for i in free if shares[i] > high[i]}
        under = {i for i in free if shares[i] < low[i]}
        if not over and not under:
            break
        # Where both bounds bind, the side with the larger violation is settled first: it cannot come free again.
        surplus = sum(shares[i] - high[i] for i in over) - sum(low[i] - shares[i] for i in under)
        settled, bound = (over, high) if surplus >= 0 else (under, low)
        for i in settled:
            shares[i] = Fraction(bound[i])
        free -= settled
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _lamp(score: Tensor) -> Tensor:
    """The LAMP scores in falling order, float64; -inf for what is not available."""
    ordered = score.flatten().double().sort(descending=True).values
    present = ordered[ordered > -math.inf]
    if len(present) and present[-1] < 0:
        raise ValueError(
            f"LAMP compares squared scores and needs them to be at least 0, as of Magnitude; got {float(present[-1])}. "
            "Use Global with this criterion."
        )
    squares = present.square()
    ordered[: len(present)] = (squares / squares.cumsum(0)).nan_to_num(0.0)  # 0 / 0 in a layer of zeros
    return ordered
