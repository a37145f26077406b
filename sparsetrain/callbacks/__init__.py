"""Lightning callbacks: one for each method, and what makes runs resumable."""

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.fixed import FixedMasks, masks_of
from sparsetrain.callbacks.gradual import GradualMagnitudePruning
from sparsetrain.callbacks.iterative import IterativeMagnitudePruning
from sparsetrain.callbacks.lottery import LotteryTicketRewinding
from sparsetrain.callbacks.nm import BidirectionalWeightPruning, StraightThroughNM
from sparsetrain.callbacks.penalty import GroupLasso, L1Penalty, LinearWeight, Penalty
from sparsetrain.callbacks.polarization import PolarizationGating
from sparsetrain.callbacks.resume import ExactResume
from sparsetrain.callbacks.shrinking import Shrinking
from sparsetrain.callbacks.soup import SparseModelSoup
from sparsetrain.callbacks.vary import Vary

__all__ = [
    "BidirectionalWeightPruning",
    "ExactResume",
    "FixedMasks",
    "GradualMagnitudePruning",
    "GroupLasso",
    "IterativeMagnitudePruning",
    "L1Penalty",
    "LinearWeight",
    "LotteryTicketRewinding",
    "Penalty",
    "PolarizationGating",
    "Shrinking",
    "SparseModelSoup",
    "SparsityCallback",
    "StraightThroughNM",
    "Vary",
    "masks_of",
]
