"""Which shapes a mask may have."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.topk import mask_largest


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
