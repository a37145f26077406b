import pytest
import torch

from sparsetrain.criteria import Magnitude, Movement, Random, Saliency
from sparsetrain.stats import Stats

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def score(criterion, weight, *, name="w", step=0, **evidence):
    return criterion.score(weight, evidence, name=name, step=step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_is_the_absolute_value_in_at_least_float32(dtype):
    weight = torch.tensor([[-3.0, 0.0], [-0.0, 2.0**-14]], dtype=dtype)
    result = score(Magnitude(), weight)
    assert result.tolist() == [[3.0, 0.0], [0.0, 2.0**-14]]
    assert not torch.signbit(result).any()
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_saliency_is_the_absolute_product_of_weight_and_gradient():
    result = score(Saliency(), torch.tensor([2.0, -3.0, 0.0]), grad=torch.tensor([-0.5, -1.0, 9.0]))
    assert result.tolist() == [1.0, 3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saliency_of_half_precision_neither_underflows_nor_ties(dtype):
    weight, grad = torch.tensor([2.0**-14, 1.0078125], dtype=dtype), torch.tensor([2.0**-14, 1.0078125], dtype=dtype)
    assert score(Saliency(), weight, grad=grad).tolist() == [2.0**-28, 1.0078125**2]


def test_movement_over_several_steps_is_the_sum_by_hand():
    stats = Stats(Movement.needs)
    weights = [[1.0, 1.0, -1.0], [0.5, 2.0, -2.0]]
    grads = [[1.0, -1.0, 1.0], [2.0, -0.5, 0.5]]
    for weight, grad in zip(weights, grads, strict=True):
        stats.observe_step("w", torch.tensor(weight), torch.tensor(grad))
    weight = torch.tensor(weights[-1])
    result = score(Movement(), weight, **stats.get("w", weight))
    assert result.tolist() == [-2.0, 2.0, 2.0]  # shrinks towards zero; grows; grows


def test_each_criterion_names_what_it_reads():
    assert [c.needs for c in (Magnitude(), Random(), Saliency(), Movement())] == [set(), set(), {"grad"}, {"movement"}]


def test_random_is_a_function_of_seed_name_and_step():
    weight = torch.zeros(4, 5)
    same = score(Random(1), weight, name="a", step=3)
    assert torch.equal(score(Random(1), torch.ones(4, 5), name="a", step=3), same)
    for seed, name, step in ((2, "a", 3), (1, "b", 3), (1, "a", 4)):
        assert not torch.equal(score(Random(seed), weight, name=name, step=step), same)


def test_random_does_not_depend_on_the_memory_format_or_type_of_the_weight():
    weight = torch.zeros(2, 3, 4, 4)
    plain = score(Random(), weight)
    assert torch.equal(score(Random(), weight.to(memory_format=torch.channels_last)), plain)
    assert torch.equal(score(Random(), weight.bfloat16()), plain)
    assert plain.dtype == torch.float32


def test_random_leaves_the_global_stream_alone_and_does_not_depend_on_it():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), score(Random(), torch.zeros(9))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(score(Random(), torch.zeros(9)), first)


def test_random_is_uniform_in_the_unit_interval():
    result = score(Random(), torch.zeros(10_000))
    assert result.min() >= 0
    assert result.max() < 1
    assert result.mean().item() == pytest.approx(0.5, abs=0.02)
    assert result.var().item() == pytest.approx(1 / 12, abs=0.01)
