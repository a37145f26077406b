import math

import pytest

from sparsetrain.report import Interval, paired, t_interval

# The 97.5 % quantile of Student's t by degrees of freedom, which printed tables round to 12.706, 4.303, 3.182, ...: the
# finite series for whole degrees (Abramowitz and Stegun 26.7.3 and 26.7.4) inverted by bisection at 30 digits.
# fmt: off
TABLE = {
    1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 5: 2.5705818, 6: 2.4469119, 7: 2.3646243, 8: 2.3060041,
    9: 2.2621572, 10: 2.2281389, 11: 2.2009852, 12: 2.1788128, 13: 2.1603687, 14: 2.1447867, 15: 2.1314495,
    16: 2.1199053, 17: 2.1098156, 18: 2.1009220, 19: 2.0930241, 20: 2.0859634, 21: 2.0796138, 22: 2.0738731,
    23: 2.0686576, 24: 2.0638986, 25: 2.0595386, 26: 2.0555294, 27: 2.0518305, 28: 2.0484071, 29: 2.0452296,
    30: 2.0422725, 100: 1.9839715,
}
# fmt: on


def half_in_standard_errors(n):
    """Half the width of an interval of n values: the quantile for n - 1 degrees of freedom."""
    interval = t_interval([*range(n)])
    return (interval.high - interval.mean) / (interval.std / math.sqrt(n))


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_the_quantile_is_that_of_the_tables(degrees, quantile):
    assert half_in_standard_errors(degrees + 1) == pytest.approx(quantile, abs=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_quantiles_of_one_and_two_degrees_are_their_closed_forms(confidence):
    # Cauchy's for 1, a root for 2.
    one, two = t_interval([-1, 1], confidence=confidence), t_interval([-1, 0, 1], confidence=confidence)
    assert one.high == pytest.approx(math.tan(math.pi * confidence / 2))
    assert two.high * math.sqrt(3) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)))


def test_the_interval_of_five_differences_is_the_one_by_hand():
    # Mean 0.4, squares of the deviations 0.09 + 0.01 + 0.04 + 0.01 + 0.01 = 0.16, so the std is sqrt(0.16 / 4) = 0.2
    # and half the width 2.7764451 * 0.2 / sqrt(5) = 0.248332.
    effect = paired([0.1, 0.5, 0.6, 0.3, 0.5])
    assert effect.n == 5
    assert (effect.mean, effect.std) == pytest.approx((0.4, 0.2))
    assert (effect.low, effect.high) == pytest.approx((0.4 - 0.248332, 0.4 + 0.248332), abs=1e-6)


def test_equal_differences_have_an_interval_without_width():
    assert paired([0.25] * 5) == Interval(mean=0.25, std=0.0, n=5, low=0.25, high=0.25)


def test_pairing_takes_out_what_a_seed_does_to_both_runs():
    control = [0.90, 0.94, 0.92, 0.96, 0.91]
    run = [value + shift for value, shift in zip(control, (0.010, 0.012, 0.009, 0.011, 0.008), strict=True)]
    assert t_interval(run).low < t_interval(control).high
    assert paired([a - b for a, b in zip(run, control, strict=True)]).low > 0


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [
        ([], 0.95, "at least 2 values; there are 0"),
        ([0.5], 0.95, "at least 2 values; there are 1. Run more seeds"),
        ([0.5, math.nan], 0.95, "Value 1 is nan"),
        ([math.inf, 0.5], 0.95, "Value 0 is inf"),
        ([0.5, 0.6], 95, r"\(0, 1\); it is 95. Give 0.95"),
        ([0.5, 0.6], 0.0, r"\(0, 1\)"),
    ],
)
def test_values_without_an_interval_are_refused(values, confidence, message):
    with pytest.raises(ValueError, match=message):
        t_interval(values, confidence=confidence)
