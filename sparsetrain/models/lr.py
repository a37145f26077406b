"""Learning-rate policies: optimizer step -> factor on the base learning rate, pure and the same on every rank.

Every policy counts optimizer steps, not epochs: a cosine falls a little at each step. Write W for the warm-up's steps
and T for the run's. A warm-up is w(t) = (t + 1) / (W + 1) for t < W and 1 from W on, so that the first step already
moves the weights and the base rate is reached at step W.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsetrain.steps import RunLength, check_steps, parse_steps


class LRPolicy(Protocol):
    """What a learning-rate policy is: one pure function of the step and the run's length."""

    def factor(self, step: int, run: RunLength) -> float:
        """What the base learning rate is multiplied by at `step` (0-based optimizer step)."""


@dataclass(frozen=True)
class ConstantLR:
    """The base learning rate at every step.

    >>> ConstantLR().factor(7, RunLength(None, None))
    1.0
    """

    def factor(self, step: int, run: RunLength) -> float:
        """1 at every step."""
        return 1.0


@dataclass(frozen=True)
class MultiStep:
    """w(t) * gamma ** (number of milestones at or before step t).

    A milestone beyond the run is never reached. The default is the usual 182-epoch CIFAR setting.

    Args:
        milestones: lengths from the start of the run, such as "91ep", in any order.
        gamma: factor at each milestone, above 0.
        warmup: length of the linear warm-up; it does not delay the milestones.

    >>> run = RunLength(steps_per_epoch=10, total_steps=100)
    >>> policy = MultiStep(("4ep", "8ep"), gamma=0.5, warmup="1it")
    >>> [policy.factor(step, run) for step in (0, 1, 39, 40, 80)]
    [0.5, 1.0, 1.0, 0.5, 0.25]

    Source: Renda et al., arXiv:2003.02389, for the 182 epochs with drops at 91 and 136.
    """

    milestones: Sequence[int | str] = ("91ep", "136ep")
    gamma: float = 0.1
    warmup: int | str = 0

    def __post_init__(self) -> None:
        if isinstance(self.milestones, str):
            raise ValueError(f"MultiStep.milestones is a list of lengths; got {self.milestones!r} alone.")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            check_steps(milestone, "MultiStep.milestones")
        check_steps(self.warmup, "MultiStep.warmup")
        if not self.gamma > 0:
            raise ValueError(f"MultiStep.gamma must be above 0; got {self.gamma}.")

    def factor(self, step: int, run: RunLength) -> float:
        """The factor at `step`; see the class."""
        passed = bisect_right(sorted(parse_steps(milestone, run) for milestone in self.milestones), step)
        return _warmup(step, parse_steps(self.warmup, run)) * self.gamma**passed


@dataclass(frozen=True)
class Cosine:
    """w(t) during the warm-up, then final + (1 - final) * (1 + cos(pi * (t - W) / (T - W))) / 2.

    `final` belongs to step T, one after the last, so that no step is spent at a rate of 0. A run that is not longer
    than its warm-up stays in it.

    Args:
        warmup: length of the linear warm-up.
        final: factor at the end of the run, in [0, 1].

    Raises:
        ValueError: the run has no fixed end.

    >>> run = RunLength(steps_per_epoch=10, total_steps=101)
    >>> [round(Cosine(warmup="1it").factor(step, run), 4) for step in (0, 1, 51, 100, 101)]
    [0.5, 1.0, 0.5, 0.0002, 0.0]

    Source: Loshchilov and Hutter, arXiv:1608.03983, equation 5, without restarts.
    """

    warmup: int | str = "50it"
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_decay("Cosine", self.warmup, self.final)

    def factor(self, step: int, run: RunLength) -> float:
        """The factor at `step`; see the class."""
        warmup, progress = _progress("Cosine", step, self.warmup, run)
        return warmup * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class LinearDecay:
    """w(t) during the warm-up, then final + (1 - final) * (T - t) / (T - W).

    `final` belongs to step T, one after the last, so that no step is spent at a rate of 0. A run that is not longer
    than its warm-up stays in it.

    Args:
        warmup: length of the linear warm-up.
        final: factor at the end of the run, in [0, 1].

    Raises:
        ValueError: the run has no fixed end.

    >>> run = RunLength(steps_per_epoch=10, total_steps=101)
    >>> [LinearDecay(warmup="1it", final=0.5).factor(step, run) for step in (0, 1, 51, 101)]
    [0.5, 1.0, 0.75, 0.5]
    """

    warmup: int | str = "50it"
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_decay("LinearDecay", self.warmup, self.final)

    def factor(self, step: int, run: RunLength) -> float:
        """The factor at `step`; see the class."""
        warmup, progress = _progress("LinearDecay", step, self.warmup, run)
        return warmup * (self.final + (1 - self.final) * (1 - progress))


def _warmup(step: int, warmup_steps: int) -> float:
    return 1.0 if step >= warmup_steps else (step + 1) / (warmup_steps + 1)


def _progress(policy: str, step: int, warmup: int | str, run: RunLength) -> tuple[float, float]:
    """The warm-up's factor, and the share of the steps after it that have passed, in [0, 1]."""
    if run.total_steps is None:
        raise ValueError(f"{policy} needs the run's end, but the run has none. Set max_epochs or max_steps.")
    warmup_steps = parse_steps(warmup, run)
    passed = (step - warmup_steps) / max(run.total_steps - warmup_steps, 1)
    return _warmup(step, warmup_steps), min(max(passed, 0.0), 1.0)


def _check_decay(policy: str, warmup: int | str, final: float) -> None:
    check_steps(warmup, f"{policy}.warmup")
    if not 0 <= final <= 1:
        raise ValueError(f"{policy}.final is a factor on the base learning rate, in [0, 1]; got {final}.")
