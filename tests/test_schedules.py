import math
import pickle

import pytest

from sparsetrain.schedules import Constant, Cubic, Linear, OneShot
from sparsetrain.steps import RunLength

RUN = RunLength(steps_per_epoch=10, total_steps=100)
RAMPS = [(Linear, 1), (Cubic, 3)]


@pytest.mark.parametrize(("ramp", "exponent"), RAMPS)
@pytest.mark.parametrize(
    ("begin", "end", "initial", "final"), [(0, 7, 0.0, 0.9), (13, 90, 0.25, 0.7), (5, 6, 0.5, 0.5)]
)
def test_ramps_follow_their_formula(ramp, exponent, begin, end, initial, final):
    schedule = ramp(final, begin=begin, end=end, every=3, initial=initial)
    for step in range(begin, end + 1):
        rest = (end - step) / (end - begin)
        assert schedule.target(step) == pytest.approx(final + (initial - final) * rest**exponent, abs=1e-12)


@pytest.mark.parametrize(("ramp", "_"), RAMPS)
def test_ramps_are_dense_before_begin_and_exactly_final_from_end_on(ramp, _):
    for final in (0.1, 0.3, 0.7, 0.9, 0.95, 0.999):
        schedule = ramp(final, begin=10, end=93, every=7, initial=0.1)
        assert {schedule.target(step) for step in range(10)} == {0.0}
        assert schedule.target(10) == pytest.approx(0.1)
        assert {schedule.target(step) for step in (93, 94, 10**9)} == {final}
        assert schedule.final_sparsity == final


@pytest.mark.parametrize(("ramp", "_"), RAMPS)
def test_ramps_never_fall(ramp, _):
    schedule = ramp(0.9, begin=3, end=1003, initial=0.1)
    targets = [schedule.target(step) for step in range(1100)]
    assert targets == sorted(targets)


@pytest.mark.parametrize(("ramp", "_"), RAMPS)
@pytest.mark.parametrize(("begin", "end", "every"), [(4, 24, 5), (4, 25, 5), (4, 5, 100), (0, 3, 1)])
def test_updates_fall_on_begin_plus_multiples_and_on_end_inclusive(ramp, _, begin, end, every):
    schedule = ramp(0.9, begin=begin, end=end, every=every)
    updates = [step for step in range(end + 200) if schedule.is_update(step)]
    assert updates == sorted({*range(begin, end, every), end})
    assert schedule.last_update == updates[-1] == end


def test_one_shot_updates_once_and_stays():
    schedule = OneShot(0.8, at="3ep").resolve(RUN)
    assert [step for step in range(100) if schedule.is_update(step)] == [30] == [schedule.last_update]
    assert [schedule.target(step) for step in (0, 29, 30, 99)] == [0.0, 0.0, 0.8, 0.8]
    assert schedule.final_sparsity == 0.8


def test_constant_is_sparse_from_the_first_step_of_any_run():
    schedule = Constant(0.5)
    assert schedule.resolve(RunLength(None, None)) == schedule
    assert [step for step in range(9) if schedule.is_update(step)] == [0]
    assert {schedule.target(step) for step in range(9)} == {0.5}


def test_resolve_turns_every_length_into_steps_and_is_idempotent():
    resolved = Cubic(0.9, begin="1ep", end="0.855run", every="0.25ep", initial=0.2).resolve(RUN)
    assert (resolved.begin, resolved.end, resolved.every) == (10, 86, 3)
    assert resolved == Cubic(0.9, begin=10, end=86, every=3, initial=0.2) == resolved.resolve(RUN)
    assert OneShot(0.5, at="0.5run").resolve(RUN) == OneShot(0.5, at=50)


def test_an_end_in_steps_needs_no_resolving_and_an_endless_run_holds_it():
    assert Linear(0.9, begin="0it", end="10it").target(5) == pytest.approx(0.45)
    assert Linear(0.9, begin=0, end=10**9).resolve(RunLength(None, None)).last_update == 10**9


def test_a_schedule_asked_before_it_is_resolved_says_so():
    for ask in (lambda s: s.target(0), lambda s: s.is_update(0), lambda s: s.last_update):
        with pytest.raises(ValueError, match="is not resolved yet"):
            ask(Cubic(0.9, begin=0, end="8ep"))


@pytest.mark.parametrize(
    "schedule",
    [
        Cubic(0.9, begin=0, end="10ep"),
        Linear(0.9, begin=0, end=100),
        Linear(0.9, begin="1ep", end="1run"),
        OneShot(0.9, at=100),
        OneShot(0.9, at="1run"),
    ],
)
def test_an_end_beyond_the_run_is_an_error_that_names_the_largest_legal_one(schedule):
    with pytest.raises(ValueError, match=r"at step 100, but the run has 100 .* largest legal end is '99it'"):
        schedule.resolve(RUN)


def test_the_largest_legal_end_is_legal():
    assert Cubic(0.9, begin=0, end="99it").resolve(RUN).last_update == 99
    assert OneShot(0.9, at="99it").resolve(RUN).last_update == 99


@pytest.mark.parametrize(("begin", "end"), [(5, 5), (6, 5), ("5it", 5)])
def test_begin_not_before_end_is_an_error_at_construction_that_offers_one_shot(begin, end):
    with pytest.raises(ValueError, match=r"begin=\d is not before end=5. .* OneShot\(..., at=5\)"):
        Linear(0.9, begin=begin, end=end)


def test_begin_not_before_end_in_epochs_is_an_error_at_resolve():
    schedule = Cubic(0.9, begin="5ep", end="50it")
    with pytest.raises(ValueError, match="begin=50 is not before end=50"):
        schedule.resolve(RUN)


def test_an_interval_of_less_than_one_step_is_an_error():
    with pytest.raises(ValueError, match="every=0 steps is no interval"):
        Linear(0.9, begin=0, end=5, every=0)
    with pytest.raises(ValueError, match="every=0 steps is no interval"):
        Linear(0.9, begin=0, end=5, every="0.01ep").resolve(RUN)


@pytest.mark.parametrize("value", [1.0, 1, -0.1, 1.5, math.nan, math.inf, True, False, "0.5", None, 80])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sparsity", Constant),
        ("sparsity", OneShot),
        ("final", lambda v: Cubic(v, begin=0, end=5)),
        ("initial", lambda v: Linear(0.9, begin=0, end=5, initial=v)),
    ],
)
def test_what_is_no_sparsity_is_an_error_that_names_argument_and_range(value, name, make):
    with pytest.raises(ValueError, match=rf"^{name}=.* is no sparsity: the share of zeros lies in \[0, 1\)"):
        make(value)


def test_a_percentage_is_answered_with_the_share():
    with pytest.raises(ValueError, match=r"Write 0.8 for 80 %"):
        Constant(80)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\)\.$"):
        Constant(1.0)


def test_a_ramp_that_falls_is_an_error():
    with pytest.raises(ValueError, match=r"initial=0.9 lies above final=0.5"):
        Linear(0.5, begin=0, end=5, initial=0.9)


@pytest.mark.parametrize("name", ["begin", "end", "every"])
def test_a_typo_in_a_length_is_an_error_at_construction(name):
    with pytest.raises(ValueError, match=f"^{name}: '3eq' is no length"):
        Cubic(0.9, **{"begin": 0, "end": 5, "every": 1, name: "3eq"})


@pytest.mark.parametrize("schedule", [Constant(0.5), OneShot(0.5, at="1ep"), Cubic(0.9, begin="1ep", end="8ep")])
def test_schedules_are_values(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert len({schedule, pickle.loads(pickle.dumps(schedule))}) == 1
