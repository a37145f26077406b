"""Target sparsity as a function of the optimizer step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from sparsetrain.steps import RunLength, check_steps, parse_steps


class Schedule(ABC):
    """When the masks are updated, and to which sparsity.

    Steps are optimizer steps, 0-based; the update of step s is made just before that step moves the weights. Lengths
    are written as in `sparsetrain.steps`; those in epochs or shares of the run have to be resolved by `resolve` first.
    """

    @abstractmethod
    def resolve(self, run: RunLength) -> Self:
        """The same schedule with every length in whole steps of `run`.

        Raises:
            ValueError: a length that `run` cannot resolve, or a last update that lies beyond the run.
        """

    @abstractmethod
    def target(self, step: int) -> float:
        """Target sparsity, in [0, 1), at `step`; 0 before the first update."""

    @abstractmethod
    def is_update(self, step: int) -> bool:
        """Whether the masks are updated at `step`."""

    @property
    @abstractmethod
    def final_sparsity(self) -> float:
        """The sparsity after the last update."""

    @property
    @abstractmethod
    def last_update(self) -> int:
        """The step of the last update: from there on the sparsity is final."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """One update: dense before step `at`, `sparsity` from then on.

    Args:
        sparsity: share of zeros, in [0, 1).
        at: the step of the update.

    >>> schedule = OneShot(0.8, at=100)
    >>> schedule.target(99), schedule.target(100), schedule.is_update(100), schedule.is_update(101)
    (0.0, 0.8, True, False)
    """

    sparsity: float
    at: int | str = "0it"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "sparsity")
        check_steps(self.at, "at")

    def resolve(self, run: RunLength) -> Self:
        at = parse_steps(self.at, run)
        _check_inside(at, run, f"{self}")
        return replace(self, at=at)

    def target(self, step: int) -> float:
        return self.sparsity if step >= _whole(self.at) else 0.0

    def is_update(self, step: int) -> bool:
        return step == _whole(self.at)

    @property
    def final_sparsity(self) -> float:
        return self.sparsity

    @property
    def last_update(self) -> int:
        return _whole(self.at)


@dataclass(frozen=True)
class Constant(OneShot):
    """The same sparsity from the first step to the last.

    Args:
        sparsity: share of zeros, in [0, 1).
    """

    at: int | str = field(default=0, init=False)

    def resolve(self, run: RunLength) -> Self:
        return self


@dataclass(frozen=True)
class Ramp(Schedule):
    """From `initial` at step `begin` to `final` at `end`: s(t) = final + (initial - final) * (1 - p)^exponent.

    p = (t - begin) / (end - begin) is the progress. Updates fall on begin + k * every and on `end`, so the final
    sparsity is reached exactly whether or not `every` divides the length of the ramp.

    Args:
        final: sparsity from `end` on, in [0, 1).
        begin: first update.
        end: last update, later than `begin`.
        every: steps from one update to the next, at least 1.
        initial: sparsity at `begin`, in [0, final].

    Raises:
        ValueError: a sparsity outside its range, or a length that is none; `resolve` also raises when `begin` is not
            before `end`, or `end` is beyond the run.
    """

    final: float
    begin: int | str
    end: int | str
    every: int | str = "100it"
    initial: float = 0.0

    exponent: ClassVar[int]

    def __post_init__(self) -> None:
        check_sparsity(self.final, "final")
        check_sparsity(self.initial, "initial")
        if self.initial > self.final:
            raise ValueError(
                f"initial={self.initial} lies above final={self.final}, but pruned weights do not come back. "
                "Let the sparsity grow."
            )
        for name in ("begin", "end", "every"):
            check_steps(getattr(self, name), name)
        if all(_is_whole(length) for length in (self.begin, self.end, self.every)):
            self._check_order()

    def resolve(self, run: RunLength) -> Self:
        resolved = replace(
            self, begin=parse_steps(self.begin, run), end=parse_steps(self.end, run), every=parse_steps(self.every, run)
        )
        _check_inside(resolved.last_update, run, f"{self}")
        return resolved

    def target(self, step: int) -> float:
        begin, end = _whole(self.begin), _whole(self.end)
        if step < begin:
            return 0.0
        progress = min((step - begin) / (end - begin), 1.0)
        return float(self.final + (self.initial - self.final) * (1.0 - progress) ** self.exponent)

    def is_update(self, step: int) -> bool:
        begin, end, every = _whole(self.begin), _whole(self.end), _whole(self.every)
        return step == end or (begin <= step < end and (step - begin) % every == 0)

    @property
    def final_sparsity(self) -> float:
        return self.final

    @property
    def last_update(self) -> int:
        return _whole(self.end)

    def _check_order(self) -> None:
        begin, end, every = _whole(self.begin), _whole(self.end), _whole(self.every)
        if begin >= end:
            raise ValueError(f"begin={begin} is not before end={end}. For a single update use OneShot(..., at={end}).")
        if every < 1:
            raise ValueError(f"every={every} steps is no interval; it must be at least 1.")


@dataclass(frozen=True)
class Linear(Ramp):
    """Sparsity that grows evenly. Arguments and errors are those of `Ramp`.

    >>> [Linear(0.8, begin=0, end=100).target(t) for t in (0, 50, 100, 150)]
    [0.0, 0.4, 0.8, 0.8]
    """

    exponent: ClassVar[int] = 1


@dataclass(frozen=True)
class Cubic(Ramp):
    """Sparsity that grows fast at first, when weights are redundant, and slowly at the end; arguments as for `Ramp`.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, eq. 1.
    Differs: `end` is always an update; there it must be begin + k * every.

    >>> [round(Cubic(0.9, begin=0, end=100).target(t), 4) for t in (10, 25, 50, 100)]
    [0.2439, 0.5203, 0.7875, 0.9]
    """

    exponent: ClassVar[int] = 3


def check_sparsity(value: float, name: str) -> None:
    """Raise unless `value` is a sparsity.

    Raises:
        ValueError: not a number in [0, 1); a `value` that looks like a percentage is answered as one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        hint = f" Write {value / 100} for {value} %." if isinstance(value, int | float) and 1 < value < 100 else ""
        raise ValueError(f"{name}={value!r} is no sparsity: the share of zeros lies in [0, 1).{hint}")


def _check_inside(last_update: int, run: RunLength, schedule: str) -> None:
    if run.total_steps is not None and last_update >= run.total_steps:
        raise ValueError(
            f"{schedule} makes its last update at step {last_update}, but the run has {run.total_steps} optimizer "
            f"steps. The largest legal end is '{run.total_steps - 1}it': prune earlier or train longer."
        )


def _is_whole(length: int | str) -> bool:
    return isinstance(length, int) or length.strip().endswith("it")


def _whole(length: int | str) -> int:
    if not _is_whole(length):
        raise ValueError(f"{length!r} is not resolved yet. Call schedule.resolve(run) first.")
    return parse_steps(length, RunLength(steps_per_epoch=None, total_steps=None))
