"""The arithmetic of many rounds: where each begins, and how sparse it is. Lengths are whole epochs or whole steps."""

from dataclasses import dataclass

from sparsetrain.schedules import check_sparsity
from sparsetrain.steps import check_steps, split_length


@dataclass(frozen=True)
class Rounds:
    """A dense phase (round 0) and the pruned rounds 1 to `count` after it, all lengths in one unit.

    The learning-rate schedule is made once, for the dense phase or, without one, for a round. Each pruned round trains
    its last `length - rewind_to` places again.

    Args:
        count: pruned rounds, at least 1.
        length: of a round that begins at place 0 of the schedule, at least 1.
        dense: of the dense phase; 0 begins with round 1.
        rewind_to: the place of the schedule from which a round of the same length as the schedule trains on, in
            [0, length).

    Raises:
        ValueError: a number outside of its range.

    >>> rounds = Rounds(count=3, length=40, dense=40, rewind_to=4)
    >>> rounds.total, rounds.start(1), rounds.start(3), rounds.at(39), rounds.at(40), rounds.at(112)
    (148, 40, 112, 0, 1, 3)
    """

    count: int
    length: int
    dense: int
    rewind_to: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"rounds is {self.count}; there must be at least 1.")
        if self.length < 1:
            raise ValueError("round_length is 0; a round trains at least one step.")
        if not 0 <= self.rewind_to < self.length:
            raise ValueError(
                f"rewind_to is {self.rewind_to}, but a round is over after {self.length}. Rewind to an earlier place."
            )

    @property
    def trained(self) -> int:
        """What one pruned round trains."""
        return self.length - self.rewind_to

    @property
    def schedule(self) -> int:
        """The length for which the learning rate is scheduled."""
        return self.dense or self.length

    @property
    def replay_from(self) -> int:
        """The place of the schedule at which each pruned round begins; negative if the schedule is too short."""
        return self.schedule - self.trained

    @property
    def total(self) -> int:
        """The length of the whole run: dense + count * (length - rewind_to)."""
        return self.dense + self.count * self.trained

    def start(self, number: int) -> int:
        """Where in the run round `number` begins, in [0, total]; `start(count + 1)` is the end."""
        return 0 if number == 0 else self.dense + (number - 1) * self.trained

    def at(self, place: int) -> int:
        """The round to which `place` of the run, in [0, total), belongs."""
        return 0 if place < self.dense else min((place - self.dense) // self.trained + 1, self.count)

    def in_steps(self, steps_per_unit: int) -> "Rounds":
        """The same, with every length multiplied."""
        return Rounds(
            self.count, self.length * steps_per_unit, self.dense * steps_per_unit, self.rewind_to * steps_per_unit
        )


def whole_lengths(**lengths: int | str) -> tuple[tuple[int, ...], str]:
    """Each length as a whole number, and the unit that all have: "ep" or "it". Zero goes with either.

    Raises:
        ValueError: no length, half an epoch, a share of the run, or two units.

    >>> whole_lengths(round_length="40ep", dense_length="0it")
    ((40, 0), 'ep')
    """
    numbers, units = [], {}
    for name, length in lengths.items():
        check_steps(length, name)
        number, unit = split_length(length)
        if unit == "run" or number != int(number):
            raise ValueError(f"{name}={length!r} must be whole epochs such as '40ep' or whole steps such as '500it'.")
        numbers.append(int(number))
        if number:
            units[name] = unit
    if len(set(units.values())) > 1:
        given = ", ".join(f"{name}={lengths[name]!r}" for name in units)
        raise ValueError(f"{given} are in two units. Give all in epochs, or all in steps.")
    return tuple(numbers), next(iter(units.values()), "it")


def sparsities(rounds: int, *, sparsity: float | None, per_round: float | None) -> tuple[float, ...]:
    """The sparsity of each round: 1 - (1 - p)**r after r rounds, which does not compound rounding.

    Args:
        rounds: how many, at least 1.
        sparsity: of the last round, in [0, 1); p = 1 - (1 - sparsity)**(1 / rounds).
        per_round: p, the share of the remaining weights that each round prunes, in [0, 1).

    Raises:
        ValueError: not exactly one of the two, or one outside of [0, 1).

    >>> [round(s, 4) for s in sparsities(3, sparsity=None, per_round=0.2)]
    [0.2, 0.36, 0.488]
    >>> [round(s, 4) for s in sparsities(2, sparsity=0.75, per_round=None)]
    [0.5, 0.75]
    """
    if sparsity is not None and per_round is None:
        check_sparsity(sparsity, "sparsity")
        return (*(1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)), sparsity)
    if per_round is not None and sparsity is None:
        check_sparsity(per_round, "per_round")
        return tuple(1 - (1 - per_round) ** r for r in range(1, rounds + 1))
    raise ValueError(
        f"sparsity={sparsity} and per_round={per_round}: give exactly one, the final sparsity or the share of the "
        "remaining weights that each round prunes."
    )
