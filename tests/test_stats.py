import pytest
import torch

from sparsetrain.stats import Stats


def observe(stats, name, steps):
    for weight, grad in steps:
        stats.observe_step(name, weight, grad)


def test_movement_is_minus_the_sum_of_weight_times_gradient():
    stats = Stats(frozenset({"movement"}))
    steps = [([1.0, -2.0], [0.5, 1.0]), ([2.0, 0.0], [-1.0, 8.0]), ([-1.0, 4.0], [3.0, -0.25])]
    observe(stats, "w", [(torch.tensor(w), torch.tensor(g)) for w, g in steps])
    by_hand = [-(1.0 * 0.5 + 2.0 * -1.0 + -1.0 * 3.0), -(-2.0 * 1.0 + 0.0 * 8.0 + 4.0 * -0.25)]
    assert stats.get("w", torch.zeros(2))["movement"].tolist() == by_hand


def test_accumulators_are_zero_before_the_first_step_and_separate_by_name():
    stats = Stats(frozenset({"movement"}))
    stats.observe_step("a", torch.ones(3), torch.ones(3))
    assert stats.get("b", torch.ones(2))["movement"].tolist() == [0.0, 0.0]
    assert stats.get("a", torch.ones(3))["movement"].tolist() == [-1.0] * 3


def test_reading_is_not_observing():
    stats = Stats(frozenset({"movement"}))
    stats.get("a", torch.ones(3))
    assert (stats.observed("a"), stats.state_dict()) == (False, {})
    stats.observe_step("a", torch.zeros(3), torch.ones(3))
    assert stats.observed("a")
    assert not stats.observed("b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_accumulators_are_float32_and_take_weights_of_any_float_type(dtype):
    stats = Stats(frozenset({"movement"}))
    weight = torch.full((3,), 2.0**-10, dtype=dtype)
    observe(stats, "w", [(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)), (weight, torch.ones_like(weight))])
    total = stats.get("w", weight)["movement"]
    assert total.dtype == torch.float32
    assert total.tolist() == [-1.0 - 2.0**-10] * 3


def test_accumulators_take_the_strides_of_the_weight():
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    total = Stats(frozenset({"movement"})).get("w", weight)["movement"]
    assert total.stride() == weight.stride()


def test_without_names_nothing_is_kept():
    stats = Stats()
    stats.observe_step("w", torch.ones(3), torch.ones(3))
    assert dict(stats.get("w", torch.ones(3))) == {}


def test_a_saved_state_continues_exactly_and_is_a_copy():
    torch.manual_seed(0)
    steps = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(6)]
    whole, first, second = (Stats(frozenset({"movement"})) for _ in range(3))
    observe(whole, "w", steps)
    observe(first, "w", steps[:3])
    second.load_state_dict(first.state_dict())
    observe(second, "w", steps[3:])
    observe(first, "w", [(torch.ones(4, 3), torch.ones(4, 3))])
    weight = torch.zeros(4, 3)
    assert torch.equal(second.get("w", weight)["movement"], whole.get("w", weight)["movement"])


def test_observing_does_not_track_gradients():
    stats = Stats(frozenset({"movement"}))
    stats.observe_step("w", torch.ones(2, requires_grad=True), torch.ones(2))
    assert not stats.get("w", torch.ones(2))["movement"].requires_grad


def test_an_unknown_statistic_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"No such statistics: \['fisher'\]. Known are \['movement'\]"):
        Stats(frozenset({"fisher", "movement"}))
