"""Learning rates after pruning: what a pruned round trains with."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class DenseRates:
    """What a retraining policy may know of one parameter group's learning rate in the dense phase.

    Args:
        last: at its last step.
    """

    last: float


class Retrain(ABC):
    """The learning rate of a pruned round."""

    @abstractmethod
    def rate(self, dense: DenseRates, step: int, length: int) -> float | None:
        """The learning rate of one parameter group at `step` (0-based) of a round of `length` optimizer steps.

        The module's own schedulers rest meanwhile. `ReplayLR` alone has none: it sets them back and lets them run.
        """


@dataclass(frozen=True)
class ReplayLR(Retrain):
    """Learning-rate rewinding: the module's own schedulers run again, from their state at the place rewound to.

    Of schedulers that only count, every round has the same learning rates; `ReduceLROnPlateau` starts from its state
    at that place and follows the metric of the round.

    Source: Renda et al. 2020, arXiv:2003.02389, section 3.
    """

    def rate(self, dense: DenseRates, step: int, length: int) -> None:
        """None, always."""


@dataclass(frozen=True)
class LastLR(Retrain):
    """Fine-tuning: the learning rate of the dense phase's last step, all the while.

    Source: Renda et al. 2020, arXiv:2003.02389, section 3 (fine-tuning); after Han et al. 2015, arXiv:1506.02626.
    """

    def rate(self, dense: DenseRates, step: int, length: int) -> float:
        """`dense.last`."""
        return dense.last
