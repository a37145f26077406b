"""Model soups: averages of networks that were retrained from one pruned network, with its masks."""

from sparsetrain.soups.distances import distances
from sparsetrain.soups.greedy import greedy
from sparsetrain.soups.mean import RunningMean, uniform
from sparsetrain.soups.members import Member, MemberMasks
from sparsetrain.soups.recalibration import recalibrate

__all__ = [
    "Member",
    "MemberMasks",
    "RunningMean",
    "distances",
    "greedy",
    "recalibrate",
    "uniform",
]
