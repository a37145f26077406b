import math

import pytest

from sparsetrain.models import ConstantLR, Cosine, LinearDecay, MultiStep
from sparsetrain.steps import RunLength

RUN = RunLength(steps_per_epoch=10, total_steps=200)
ENDLESS = RunLength(steps_per_epoch=None, total_steps=None)


def test_constant_is_one_at_every_step_of_any_run():
    assert {ConstantLR().factor(step, ENDLESS) for step in range(5)} == {1.0}


def test_multistep_drops_exactly_at_each_milestone():
    policy = MultiStep(milestones=("5ep", 120, "0.75run"), gamma=0.1)
    for step in range(250):
        expected = 0.1 ** sum(step >= milestone for milestone in (50, 120, 150))
        assert policy.factor(step, RUN) == pytest.approx(expected, rel=1e-12)


def test_multistep_does_not_depend_on_the_order_of_its_milestones():
    policies = MultiStep(("5ep", "8ep")), MultiStep(("8ep", "5ep"))
    assert [policies[0].factor(s, RUN) for s in range(200)] == [policies[1].factor(s, RUN) for s in range(200)]


def test_multistep_by_steps_needs_no_run_length():
    assert MultiStep(("5it",), gamma=0.5).factor(5, ENDLESS) == 0.5


@pytest.mark.parametrize("policy", [MultiStep((), warmup=4), Cosine(warmup=4), LinearDecay(warmup="4it")])
def test_warmup_rises_linearly_from_above_zero_and_ends_at_the_base_rate(policy):
    assert [policy.factor(step, RUN) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_is_the_closed_form_between_warmup_and_end(final):
    policy = Cosine(warmup="2ep", final=final)
    for step in range(20, 200):
        expected = final + 0.5 * (1 - final) * (1 + math.cos(math.pi * (step - 20) / 180))
        assert policy.factor(step, RUN) == pytest.approx(expected, abs=1e-12)
    assert policy.factor(110, RUN) == pytest.approx((1 + final) / 2)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_decay_is_the_straight_line_to_final_at_the_step_after_the_last(final):
    policy = LinearDecay(warmup=0, final=final)
    for step in range(201):
        assert policy.factor(step, RUN) == pytest.approx(1 + (final - 1) * step / 200, abs=1e-12)


@pytest.mark.parametrize("policy", [Cosine(warmup=0, final=0.2), LinearDecay(warmup=0, final=0.2)])
def test_the_rate_stays_at_final_beyond_the_run(policy):
    assert [policy.factor(step, RUN) for step in (200, 201, 500)] == pytest.approx([0.2] * 3)
    assert policy.factor(199, RUN) > 0.2


@pytest.mark.parametrize("policy", [Cosine(warmup="50it"), LinearDecay(warmup="50it"), MultiStep(warmup="50it")])
def test_a_run_shorter_than_its_warmup_stays_in_the_warmup(policy):
    run = RunLength(steps_per_epoch=1, total_steps=1)
    assert policy.factor(0, run) == pytest.approx(1 / 51)


@pytest.mark.parametrize("policy", [Cosine(), LinearDecay()])
def test_a_decay_over_an_endless_run_is_an_error_that_names_the_remedy(policy):
    with pytest.raises(ValueError, match=r"no.*end|has none\. Set max_epochs or max_steps"):
        policy.factor(0, ENDLESS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiStep("91ep"), "list of lengths; got '91ep'"),
        (lambda: MultiStep(("91 epochs",)), "MultiStep.milestones: '91 epochs'"),
        (lambda: MultiStep(gamma=0.0), "gamma must be above 0; got 0.0"),
        (lambda: MultiStep(warmup="5e"), "MultiStep.warmup: '5e'"),
        (lambda: Cosine(warmup="-1it"), "Cosine.warmup"),
        (lambda: Cosine(final=1.5), r"Cosine.final .*\[0, 1\]; got 1.5"),
        (lambda: LinearDecay(final=-0.1), "LinearDecay.final"),
        (lambda: LinearDecay(warmup="2runs"), "LinearDecay.warmup"),
    ],
)
def test_bad_arguments_fail_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lists_become_tuples_so_that_policies_are_values():
    assert MultiStep(["1ep", "2ep"]) == MultiStep(("1ep", "2ep"))
    assert hash(MultiStep(["1ep"])) == hash(MultiStep(("1ep",)))
