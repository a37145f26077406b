"""How certain a mean over seeds is."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and how certain it is; made by `t_interval` and `paired`.

    Args:
        mean: of the n values.
        std: their sample standard deviation, with n - 1 in the denominator.
        n: how many values, at least 2.
        low: lower end of the confidence interval of the mean.
        high: its upper end.
    """

    mean: float
    std: float
    n: int
    low: float
    high: float


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of independent, roughly normal values with its two-sided interval: mean -+ t(n - 1) * std / sqrt(n).

    Needs scipy, which the extra `sparsetrain[train]` brings: torch has no quantile of Student's t.

    Args:
        values: one per seed; at least 2, finite.
        confidence: how often such intervals hold the true mean, in (0, 1).

    Raises:
        ValueError: fewer than 2 values, one that is not finite, or a confidence outside (0, 1).

    >>> interval = t_interval([1.0, 2.0, 3.0])
    >>> interval.mean, interval.std, round(interval.low, 3), round(interval.high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    # Only the special function: scipy.stats takes half a second to import.
    from scipy.special import stdtrit

    if len(values) < 2:
        raise ValueError(f"An interval needs at least 2 values; there are {len(values)}. Run more seeds.")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"Value {index} is {value}. Find out why that run diverged, or leave its seed out of both."
            )
    if not 0 < confidence < 1:
        raise ValueError(f"A confidence lies in (0, 1); it is {confidence}. Give 0.95 for 95 %.")
    n, mean, std = len(values), statistics.fmean(values), statistics.stdev(values)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * std / math.sqrt(n)
    return Interval(mean=mean, std=std, n=n, low=mean - half, high=mean + half)


def paired(differences: Sequence[float]) -> Interval:
    """The mean effect with its 95 % interval, from one difference per seed: run minus control of the *same* seed.

    What a seed does to both runs alike cancels, so this is narrower than comparing two intervals; an effect is there
    if the interval leaves out 0. Give at least 5 seeds. With n = 2 it is 12.7 standard errors wide to each side.

    Args:
        differences: one per seed; at least 2, finite.

    Raises:
        ValueError, ImportError: as `t_interval`.

    >>> effect = paired([0.01, 0.02, 0.03])
    >>> effect.n, effect.low > 0
    (3, False)
    """
    return t_interval(differences)
