"""Learning rates after pruning: what a pruned round trains with."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar


@dataclass(frozen=True)
class DenseRates:
    """The learning rate of one parameter group in the dense phase.

    Args:
        starts: the steps from which on a rate holds, ascending from 0.
        rates: these, as many.
        length: optimizer steps of the phase, at least 1.
    """

    starts: tuple[int, ...]
    rates: tuple[float, ...]
    length: int

    def at(self, step: int) -> float:
        """The rate of `step`, in [0, length)."""
        return self.rates[bisect_right(self.starts, step) - 1]

    @property
    def last(self) -> float:
        """The rate of the last step."""
        return self.rates[-1]

    @cached_property
    def highest(self) -> float:
        """The highest rate."""
        return max(self.rates)

    @cached_property
    def warm_up(self) -> int:
        """The step at which the highest rate is reached first: what comes before counts as the warm-up."""
        return self.starts[self.rates.index(self.highest)]

    @cached_property
    def lowest(self) -> float:
        """The lowest rate after the warm-up."""
        return min(self.rates[self.rates.index(self.highest) :])


@dataclass(frozen=True)
class PruningStep:
    """What the pruning with which a round begins took away from the weights as trained, before any rewinding.

    Args:
        share: the weights pruned, of those that were left before, in [0, 1).
        norm_drop: the Euclidean norm of these weights, relative to that of all maskable ones before, in [0, 1].
    """

    share: float
    norm_drop: float


class Retrain(ABC):
    """The learning rate of a pruned round.

    Attributes:
        needs_dense_phase: whether one rate, that with which the optimizer was made, does not do in place of those of a
            dense phase.
    """

    needs_dense_phase: ClassVar[bool] = False

    @abstractmethod
    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float | None:
        """The learning rate of one parameter group at `step` (0-based) of a round of `length` optimizer steps.

        None leaves it as it is. The module's own schedulers rest meanwhile; under `ReplayLR` alone they run again.
        """


@dataclass(frozen=True)
class ReplayLR(Retrain):
    """Learning-rate rewinding: each step has the rate that it had in the dense phase, whoever set it.

    The module's own schedulers run again, from their state at the place rewound to, for what else they set, such as
    momentum. With a `ReduceLROnPlateau` among them the rates are the schedulers': it starts from its state at that
    place and follows the metric of the round.

    Source: Renda et al. 2020, arXiv:2003.02389, section 3.
    """

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> None:
        """None, always."""


@dataclass(frozen=True)
class LastLR(Retrain):
    """Fine-tuning: the learning rate of the dense phase's last step, all the while.

    Source: Renda et al. 2020, arXiv:2003.02389, section 3 (fine-tuning); after Han et al. 2015, arXiv:1506.02626.
    """

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float:
        """`dense.last`."""
        return dense.last


@dataclass(frozen=True)
class LinearLR(Retrain):
    """LLR: from the dense phase's highest learning rate linearly to 0, which it would reach one step after the round.

    The first tenth of the round warms up from 0, along half a cosine: step 0 has the rate 0, if the round has at least
    ten steps.

    Source: Zimmer et al. 2023, arXiv:2111.00843 (LLR); the warm-up from their code, ZIB-IOL/SMS.
    """

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float:
        """`highest * (length - step) / (length - warm_up)`, with warm_up = floor(length / 10)."""
        return _linear(dense.highest, step, length)


@dataclass(frozen=True)
class AdaptiveLR(Retrain):
    """ALLR: linearly to 0, as `LinearLR`, from a rate that is higher the more a pruning took away.

    It begins at highest * norm_drop / sqrt(share), but at least at highest * length / (steps of the dense phase), and
    at most at the dense phase's highest rate. With magnitude pruning norm_drop / sqrt(share) is at most 1. Where
    nothing is pruned it begins at that lower limit, so its control with `sparsity=0.0` has other rates.

    Source: Zimmer et al. 2023, arXiv:2111.00843 (ALLR).
    Differs: norms are of the maskable weights, as in the paper; the authors' code, ZIB-IOL/SMS, adds biases and
        normalization layers.
    """

    needs_dense_phase = True

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float:
        """As `LinearLR`, from another rate."""
        drop = pruned.norm_drop / math.sqrt(pruned.share) if pruned.share else 0.0
        return _linear(dense.highest * min(max(drop, length / dense.length), 1.0), step, length)


@dataclass(frozen=True)
class CyclicLR(Retrain):
    """CLR: along half a cosine from the dense phase's highest learning rate to its lowest, after a warm-up.

    The first tenth of the round warms up, as with `LinearLR`.

    Source: Le & Hua 2021, arXiv:2105.03193 (cyclic learning-rate restarting); warm-up and lowest rate as in the code of
        Zimmer et al., ZIB-IOL/SMS.
    Differs: the lowest rate is sought from the highest one on, as what comes before counts as the warm-up; the code is
        told how long that is.
    """

    needs_dense_phase = True

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float:
        """`lowest + (highest - lowest) * (1 + cos(pi * t)) / 2`, t from 0 after the warm-up to 1 after the round."""
        warm_up = _warm_up_length(length)
        if step < warm_up:
            return _warm_up(dense.highest, step, warm_up)
        turn = math.pi * (step - warm_up) / (length - warm_up)
        return dense.lowest + (dense.highest - dense.lowest) * (1 + math.cos(turn)) / 2


@dataclass(frozen=True)
class ScaledLR(Retrain):
    """SLR: the dense phase's learning rates in the length of the round, with their warm-up replaced by the highest one.

    The first tenth of the round warms up, as with `LinearLR`.

    Source: Le & Hua 2021, arXiv:2105.03193 (scaled learning-rate restarting); warm-up as in the code of Zimmer et al.,
        ZIB-IOL/SMS.
    Differs: what comes before the highest rate counts as the warm-up; the code is told how long that is.
    """

    needs_dense_phase = True

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float:
        """The dense phase's rate at the same share of its length."""
        warm_up = _warm_up_length(length)
        if step < warm_up:
            return _warm_up(dense.highest, step, warm_up)
        place = (step - warm_up) * dense.length // (length - warm_up)
        return dense.at(max(place, dense.warm_up))


def _linear(start: float, step: int, length: int) -> float:
    warm_up = _warm_up_length(length)
    if step < warm_up:
        return _warm_up(start, step, warm_up)
    return start * (length - step) / (length - warm_up)


def _warm_up_length(length: int) -> int:
    return length // 10


def _warm_up(end: float, step: int, length: int) -> float:
    return end * (1 - math.cos(math.pi * step / length)) / 2
