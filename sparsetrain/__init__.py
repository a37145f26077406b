"""Training-time sparsity for PyTorch Lightning: exact masks, exact resume, one callback."""

from sparsetrain.allocation import ERK, LAMP, Global, Uniform
from sparsetrain.callbacks import (
    BidirectionalWeightPruning,
    ExactResume,
    FixedMasks,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    LotteryTicketRewinding,
    PolarizationGating,
    Shrinking,
    SparseModelSoup,
    SparsityCallback,
    StraightThroughNM,
    Vary,
    masks_of,
)
from sparsetrain.criteria import Magnitude, Movement, Random, Saliency
from sparsetrain.mask_files import load_masks, save_masks
from sparsetrain.masks import Masks, Pruning, prune
from sparsetrain.patterns import NM, Channel, TransposableNM, Unstructured
from sparsetrain.retrain import AdaptiveLR, CyclicLR, LastLR, LinearLR, ReplayLR, ScaledLR
from sparsetrain.schedules import Constant, Cubic, Linear, OneShot
from sparsetrain.selection import Selection, first_and_last
from sparsetrain.tickets import Ticket

__version__ = "0.1.0"

__all__ = [
    "ERK",
    "LAMP",
    "NM",
    "AdaptiveLR",
    "BidirectionalWeightPruning",
    "Channel",
    "Constant",
    "Cubic",
    "CyclicLR",
    "ExactResume",
    "FixedMasks",
    "Global",
    "GradualMagnitudePruning",
    "IterativeMagnitudePruning",
    "LastLR",
    "Linear",
    "LinearLR",
    "LotteryTicketRewinding",
    "Magnitude",
    "Masks",
    "Movement",
    "OneShot",
    "PolarizationGating",
    "Pruning",
    "Random",
    "ReplayLR",
    "Saliency",
    "ScaledLR",
    "Selection",
    "Shrinking",
    "SparseModelSoup",
    "SparsityCallback",
    "StraightThroughNM",
    "Ticket",
    "TransposableNM",
    "Uniform",
    "Unstructured",
    "Vary",
    "first_and_last",
    "load_masks",
    "masks_of",
    "prune",
    "save_masks",
]
