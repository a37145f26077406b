import pytest

from sparsetrain.retrain import DenseRates, LastLR, ReplayLR, Retrain

PLACES = [(step, length) for length in (1, 2, 9) for step in range(length)]


@pytest.mark.parametrize(("step", "length"), PLACES)
def test_a_replay_leaves_every_step_to_the_schedulers(step, length):
    assert ReplayLR().rate(DenseRates(0.1), step, length) is None


@pytest.mark.parametrize(("step", "length"), PLACES)
def test_fine_tuning_trains_every_step_with_the_dense_phases_last_rate(step, length):
    assert LastLR().rate(DenseRates(0.03), step, length) == 0.03


def test_policies_are_values_that_compare_and_hash():
    assert ReplayLR() == ReplayLR() != LastLR()
    assert len({ReplayLR(), ReplayLR(), LastLR(), LastLR()}) == 2


def test_a_policy_must_say_its_rate():
    class Silent(Retrain):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()
