"""Which weights matter: scores, larger = keep."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsetrain.rng import generator


class Criterion(ABC):
    """Scores the weights of one tensor; a frozen dataclass with one method.

    `needs` names what beside the weight it reads: "grad" (the gradient of the step, final and unscaled), or a running
    statistic of `sparsetrain.stats`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def score(self, weight: Tensor, evidence: Mapping[str, Tensor], *, name: str, step: int) -> Tensor:
        """One score per weight.

        Args:
            weight: any shape.
            evidence: what `needs` names, each of the shape of `weight`.
            name: the parameter's name, for criteria that draw random numbers.
            step: the optimizer step, likewise.

        Returns:
            Finite scores of the same shape, float32 or float64; larger = keep.
        """


@dataclass(frozen=True)
class Magnitude(Criterion):
    """|w|. Source: Han et al. 2015, arXiv:1506.02626."""

    def score(self, weight: Tensor, evidence: Mapping[str, Tensor], *, name: str, step: int) -> Tensor:
        return _real(weight).abs()


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform in [0, 1), a fixed function of (seed, parameter name, step): the same on every rank and device.

    Args:
        seed: of the stream of scores; independent of the run's global seed.
    """

    seed: int = 0

    def score(self, weight: Tensor, evidence: Mapping[str, Tensor], *, name: str, step: int) -> Tensor:
        return torch.rand(weight.shape, generator=generator(self.seed, name, step)).to(weight.device)


@dataclass(frozen=True)
class Saliency(Criterion):
    """|w * dL/dw|: the first-order change of the loss when the weight is removed, on the batch of the update step.

    Source: Mozer & Smolensky 1989; Lee et al. 2019 (SNIP), arXiv:1810.02340, eq. 5, without its normalisation.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def score(self, weight: Tensor, evidence: Mapping[str, Tensor], *, name: str, step: int) -> Tensor:
        return (_real(weight) * evidence["grad"]).abs()


@dataclass(frozen=True)
class Movement(Criterion):
    """- sum over steps of w * dL/dw: large for weights that training moves away from zero.

    Source: Sanh et al. 2020, arXiv:2005.07683, eq. 5 (up to the constant learning rate of the scores).
    Differs: pruned weights are zero and stay so, hence their score no longer changes; there they can come back.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"movement"})

    def score(self, weight: Tensor, evidence: Mapping[str, Tensor], *, name: str, step: int) -> Tensor:
        return evidence["movement"]


def _real(weight: Tensor) -> Tensor:
    """At least float32: half-precision products would tie and underflow."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
