import math

import pytest

from sparsetrain.retrain import (
    AdaptiveLR,
    CyclicLR,
    DenseRates,
    LastLR,
    LinearLR,
    PruningStep,
    ReplayLR,
    Retrain,
    ScaledLR,
)

LENGTHS = [1, 2, 9, 10, 25, 40]
PRUNED = PruningStep(0.36, 0.3)  # norm_drop / sqrt(share) = 0.5

# The rate of each step of a dense phase.
SCHEDULES = {
    "constant": [0.1] * 12,
    "steps": [0.4] * 8 + [0.04] * 8 + [0.004] * 4,
    "warm_up": [0.001, 0.1, 0.2, 0.3] + [0.3 * math.cos(math.pi * i / 40) for i in range(19)] + [0.02, 0.01],
    "cycles_up_again": [0.1, 0.3, 0.05, 0.2, 0.3, 0.1],
    "one": [0.7],
}
every_schedule = pytest.mark.parametrize("dense", SCHEDULES.values(), ids=SCHEDULES)


def told(dense: list[float]) -> DenseRates:
    """What a policy is told of a dense phase."""
    starts = [step for step, rate in enumerate(dense) if step == 0 or rate != dense[step - 1]]
    return DenseRates(tuple(starts), tuple(dense[step] for step in starts), len(dense))


def rates(policy: Retrain, dense: list[float], length: int, pruned: PruningStep = PRUNED) -> list[float]:
    return [policy.rate(told(dense), pruned, step, length) for step in range(length)]


def warmed_up(start: float, after: list[float], length: int) -> list[float]:
    """The slow reference: a tenth of the round along half a cosine from 0 to `start`, then `after`."""
    warm_up = int(length * 0.1)
    ramp = [start / 2 - start / 2 * math.cos(math.pi * step / warm_up) for step in range(warm_up)]
    assert len(ramp) + len(after) == length
    return ramp + after


def rest(length: int) -> int:
    return length - int(length * 0.1)


@every_schedule
def test_what_is_told_of_a_dense_phase_gives_each_steps_rate(dense):
    facts = told(dense)
    assert [facts.at(step) for step in range(len(dense))] == dense
    top = dense.index(max(dense))
    assert (facts.last, facts.highest, facts.lowest, facts.warm_up) == (dense[-1], max(dense), min(dense[top:]), top)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_replay_leaves_every_step_to_the_schedulers(length):
    assert rates(ReplayLR(), SCHEDULES["steps"], length) == [None] * length


@pytest.mark.parametrize("length", LENGTHS)
@every_schedule
def test_fine_tuning_trains_every_step_with_the_dense_phases_last_rate(dense, length):
    assert rates(LastLR(), dense, length) == [dense[-1]] * length


@pytest.mark.parametrize("length", LENGTHS)
@every_schedule
def test_the_linear_policy_falls_from_the_highest_rate_to_one_step_above_zero(dense, length):
    top, n = max(dense), rest(length)
    expected = warmed_up(top, [top - top * i / n for i in range(n)], length)
    assert rates(LinearLR(), dense, length) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@every_schedule
def test_the_cyclic_policy_falls_along_half_a_cosine_to_the_lowest_rate_after_the_warm_up(dense, length):
    top, n = max(dense), rest(length)
    low = min(dense[dense.index(top) :])
    expected = warmed_up(top, [(top + low) / 2 + (top - low) / 2 * math.cos(math.pi * i / n) for i in range(n)], length)
    assert rates(CyclicLR(), dense, length) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@every_schedule
def test_the_scaled_policy_has_the_dense_phases_rates_at_the_same_shares(dense, length):
    top, n = max(dense), rest(length)
    without_warm_up = [top] * dense.index(top) + dense[dense.index(top) :]
    expected = warmed_up(top, [without_warm_up[math.floor(i * len(dense) / n + 1e-9)] for i in range(n)], length)
    assert rates(ScaledLR(), dense, length) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("pruned", "length", "share_of_highest"),
    [
        (PRUNED, 10, 0.5),  # 0.3 / 0.6; the round is a quarter of the 40 dense steps
        (PRUNED, 30, 0.75),  # at least length / dense steps
        (PRUNED, 90, 1.0),  # a round longer than the dense phase
        (PruningStep(0.36, 0.7), 10, 1.0),  # random masks can take more than their share: at most the highest
        (PruningStep(0.0, 0.0), 10, 0.25),  # nothing pruned
    ],
)
def test_the_adaptive_policy_begins_at_the_norm_drop_between_its_limits(pruned, length, share_of_highest):
    dense = [0.8] * 30 + [0.1] * 10
    start, n = 0.8 * share_of_highest, rest(length)
    expected = warmed_up(start, [start - start * i / n for i in range(n)], length)
    assert rates(AdaptiveLR(), dense, length, pruned) == pytest.approx(expected, abs=1e-12)


def test_policies_are_values_that_compare_and_hash():
    policies = [ReplayLR, LastLR, LinearLR, AdaptiveLR, CyclicLR, ScaledLR]
    assert [policy() for policy in policies] == [policy() for policy in policies]
    assert len({policy() for policy in 2 * policies}) == 6


def test_a_policy_must_say_its_rate():
    class Silent(Retrain):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()
