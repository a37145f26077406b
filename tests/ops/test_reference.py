"""The masks and the pruned operands are what a sort in Python says, bit for bit."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops import slow

from sparsetrain.nm import CHUNK
from sparsetrain.ops.reference import masked, nm_mask, prune_

RATIOS = [(1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (2, 16), (3, 7)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan, 1e-5])


def rough(shape, dtype=torch.float32, seed=0):
    """Few distinct values, so that ties, zeros, infinities and NaN meet in most groups."""
    generator = torch.Generator().manual_seed(seed)
    return SPECIAL.to(dtype)[torch.randint(len(SPECIAL), shape, generator=generator)]


def bits(tensor):
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_masks_are_those_of_a_sort_by_bits_then_index(n, m, dtype):
    for axis in (0, 1):
        for shape in ((3 * m, 2 * m), (m, 2 * m, 3, 1)):
            for weight in (rough(shape, dtype), torch.randn(shape).to(dtype)):
                assert torch.equal(nm_mask(weight, n, m, axis), slow.group_mask(weight, n, m, axis))


@pytest.mark.parametrize(("n", "m"), RATIOS[:5])
def test_exactly_n_survive_in_a_million_groups_with_ties_zeros_inf_and_nan(n, m):
    groups = 1_000_000
    weight = torch.where(torch.rand(groups, m) < 0.5, rough((groups, m)), torch.randn(groups, m))
    assert (nm_mask(weight, n, m, axis=1).sum(1, dtype=torch.int16) == n).all()
    assert (nm_mask(weight.t().contiguous(), n, m, axis=0).sum(0, dtype=torch.int16) == n).all()


def test_ties_go_to_the_lower_index_and_nan_above_infinity():
    assert nm_mask(torch.zeros(1, 4), 2, 4).tolist() == [[True, True, False, False]]
    assert nm_mask(torch.tensor([[0.0, 1.0, -1.0, 1.0]]), 2, 4).tolist() == [[False, True, True, False]]
    assert nm_mask(torch.tensor([[math.inf, -math.inf, math.nan, 9.0]]), 2, 4).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_mask_does_not_depend_on_the_memory_format(axis):
    weight = torch.randn(16, 24, 3, 3)
    expected = slow.group_mask(weight, 2, 4, axis)
    last = weight.to(memory_format=torch.channels_last)
    mask = nm_mask(last, 2, 4, axis)
    assert torch.equal(mask, expected)
    assert mask.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nm_mask(weight.transpose(0, 1), 2, 4, 1 - axis), expected.transpose(0, 1))
    assert torch.equal(nm_mask(weight[:, :8], 2, 4, axis), slow.group_mask(weight[:, :8], 2, 4, axis))


def test_chunks_leave_no_seam():
    rows = 3 * CHUNK // 512 + 4
    weight = torch.randint(-3, 4, (rows, 512)).float()
    forward, backward = torch.empty_like(weight), torch.empty_like(weight)
    prune_(weight, 2, 4, forward=forward, backward=backward)
    for axis, out in ((1, forward), (0, backward)):
        groups = weight.abs().view(-1, 4) if axis else weight.abs().t().reshape(-1, 4)
        order = groups.sort(dim=1, descending=True, stable=True).indices[:, :2]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
        mask = mask.view(weight.shape) if axis else mask.view(512, rows).t()
        assert torch.equal(out, weight * mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pruned_operands_are_the_weight_or_plus_zero_bit_for_bit(dtype, compute, memory_format):
    weight = rough((16, 8, 3, 3), dtype).to(memory_format=memory_format)
    forward = torch.empty_like(weight, dtype=compute)
    backward = torch.empty_like(forward)
    prune_(weight, 2, 4, forward=forward, backward=backward)
    cast = weight.to(compute or dtype)
    for out, axis in ((forward, 1), (backward, 0)):
        mask = slow.group_mask(weight, 2, 4, axis)
        assert torch.equal(bits(out), bits(torch.where(mask, cast, 0)))
        assert torch.equal(bits(masked(weight, mask, compute)), bits(out))
    alone = torch.empty_like(forward)
    prune_(weight, 2, 4, backward=alone)
    assert torch.equal(bits(alone), bits(backward))


def test_pruning_leaves_weight_and_mask_alone():
    weight = torch.randn(8, 8, requires_grad=True)
    before, mask = weight.detach().clone(), torch.rand(8, 8) < 0.5
    kept = mask.clone()
    masked(weight.detach(), mask)
    prune_(weight, 2, 4, forward=torch.empty(8, 8))
    assert torch.equal(weight, before)
    assert torch.equal(mask, kept)


def test_scratch_memory_is_not_shared_by_threads_and_survives_inference_mode():
    weights = [torch.randn(64, 64 * (i + 1)) for i in range(8)]
    with torch.inference_mode():
        expected = [slow.group_mask(weight, 2, 4, 1) for weight in weights]
        assert torch.equal(nm_mask(weights[0], 2, 4), expected[0])

    def prune(index):
        for _ in range(20):
            out = torch.empty_like(weights[index])
            prune_(weights[index], 2, 4, forward=out)
            assert torch.equal(out, weights[index] * expected[index])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(prune, range(8)))
    assert prune(0)


def test_integers_and_float8_are_refused():
    with pytest.raises(ValueError, match=r"got torch.int32. Cast the weight"):
        nm_mask(torch.ones(4, 4, dtype=torch.int32), 2, 4)
