import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from sparsetrain.allocation import ERK, LAMP, Candidates, Global, Uniform
from sparsetrain.masks import Masks, Pruning

ALLOCATIONS = [Global(), Global(floor=0), Global(floor=3), Global(floor_share=0.02), Uniform(), ERK(), LAMP()]


def stream(seed):
    return torch.Generator().manual_seed(seed)


def candidates(scores, available=None):
    """Candidates of given scores; of each tensor only the first `available` may be kept."""
    available = available or [score.numel() for score in scores]
    marked = []
    for score, n in zip(scores, available, strict=True):
        flat = score.reshape(-1).clone()
        flat[n:] = -math.inf
        marked.append(flat.view(score.shape))
    return Candidates([score.shape for score in scores], available, [lambda s=s: s for s in marked])


def draw(shapes, seed=0):
    random = stream(seed)
    return [torch.randn(shape, generator=random).abs() * 2 ** int(i % 3) for i, shape in enumerate(shapes)]


def largest_remainder(shares, total):
    """Hamilton's method: round down, then one more for the largest remainders, the first of equal ones."""
    counts = [int(share) for share in shares]
    while sum(counts) < total:
        remainders = [share - count for share, count in zip(shares, counts, strict=True)]
        counts[remainders.index(max(remainders))] += 1
    return counts


def clipped_proportion(weights, total, low, high):
    """Clip c * weight to its bounds; the c for which they add up lies between two of the c at which a bound begins."""

    def clip(c):
        return [min(max(c * w, lo), hi) for w, lo, hi in zip(weights, low, high, strict=True)]

    ends = sorted({Fraction(bound, w) for bounds in (low, high) for bound, w in zip(bounds, weights, strict=True)})
    if sum(clip(ends[0])) == total:
        return clip(ends[0])
    for left, right in itertools.pairwise(ends):
        below, above = sum(clip(left)), sum(clip(right))
        if below < total <= above:
            return clip(left + (right - left) * Fraction(total - below, above - below))
    raise AssertionError("no solution")


def best_counts(scores, available, kept, low):
    """All count vectors: the best keeps the lexicographically largest scores, and of equal ones most in front."""
    ordered = [sorted(score.flatten().tolist(), reverse=True) for score in scores]
    choices = [
        (sorted(itertools.chain(*(o[:n] for o, n in zip(ordered, counts, strict=True))), reverse=True), counts)
        for counts in itertools.product(*(range(lo, n + 1) for lo, n in zip(low, available, strict=True)))
        if sum(counts) == kept
    ]
    return list(max(choices)[1])


@pytest.mark.parametrize("floor", [0, 1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(5, 3, 4), (1, 6, 2, 3), (7,), (2, 2, 2, 2)])
def test_global_is_the_best_choice_of_all_that_leave_every_tensor_its_floor(floor, tied, sizes):
    for seed in range(6):
        scores = draw([(n,) for n in sizes], seed)
        if tied:
            scores = [score.round() for score in scores]
        low = [min(floor, n) for n in sizes]
        for kept in range(sum(low), sum(sizes) + 1):
            counts = Global(floor=floor).divide(candidates(scores), kept).kept
            assert list(counts) == best_counts(scores, sizes, kept, low)


def test_global_is_the_best_choice_among_the_weights_that_are_available():
    sizes, available = (5, 3, 4), [2, 3, 1]
    for seed in range(10):
        scores = draw([(n,) for n in sizes], seed)
        open_scores = [score[:n] for score, n in zip(scores, available, strict=True)]
        for floor in (0, 1, 2):
            low = [min(floor, n) for n in available]
            for kept in range(sum(low), sum(available) + 1):
                counts = Global(floor=floor).divide(candidates(scores, available), kept).kept
                assert list(counts) == best_counts(open_scores, available, kept, low)


def test_global_without_floors_is_the_top_k_of_all():
    scores = draw([(40, 30), (9,), (500,)])
    joined = torch.cat([score.flatten() for score in scores])
    for kept in (1, 100, 1000):
        cut = joined.sort(descending=True).values[kept - 1]
        budget = Global(floor=0).divide(candidates(scores), kept)
        assert list(budget.kept) == [int((score >= cut).sum()) for score in scores]
        assert budget.cut == float(cut)


def test_a_floor_share_counts_in_all_weights_and_the_larger_floor_holds():
    scores = [torch.ones(100) * 5, torch.ones(60), torch.ones(40) * 0.1]
    assert list(Global(floor_share=0.05).divide(candidates(scores), 100).kept) == [80, 10, 10]
    assert list(Global(floor=20, floor_share=0.05).divide(candidates(scores), 100).kept) == [60, 20, 20]
    assert list(Global(floor=1, floor_share=0.0025).divide(candidates(scores), 3).kept) == [1, 1, 1]


@pytest.mark.parametrize("sizes", [(6, 6, 2), (10, 10, 10), (1000, 1, 7), (13, 400, 255, 31), (9,)])
def test_uniform_is_proportional_to_size_by_largest_remainders(sizes):
    scores = draw([(n,) for n in sizes])
    total = sum(sizes)
    for kept in {*range(min(total, 40)), total // 2, total - 1, total}:
        expected = largest_remainder([Fraction(kept * n, total) for n in sizes], kept)
        assert list(Uniform(floor=0).divide(candidates(scores), kept).kept) == expected
        for count, n in zip(expected, sizes, strict=True):
            assert abs(count - kept * n / total) < 1


@pytest.mark.parametrize("allocation", [Uniform, ERK])
def test_bounds_clip_the_proportional_shares(allocation):
    random = stream(1)
    for _ in range(300):
        shapes = [tuple(torch.randint(1, 7, (2,), generator=random).tolist()) for _ in range(4)]
        scores = draw(shapes)
        available = [int(torch.randint(0, s.numel() + 1, (1,), generator=random)) for s in scores]
        floor = int(torch.randint(0, 5, (1,), generator=random))
        low = [min(floor, n) for n in available]
        kept = int(torch.randint(sum(low), sum(available) + 1, (1,), generator=random))
        weights = [s.numel() if allocation is Uniform else sum(s.shape) for s in scores]
        expected = largest_remainder(clipped_proportion(weights, kept, low, available), kept)
        assert list(allocation(floor=floor).divide(candidates(scores, available), kept).kept) == expected


def erk_densities(shapes, kept):
    """Evci et al.: density = eps * (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w); over 1 is made dense."""
    raw = [Fraction(sum(shape), math.prod(shape)) for shape in shapes]
    dense: set[int] = set()
    while True:
        left = kept - sum(math.prod(shapes[i]) for i in dense)
        sparse = [i for i in range(len(shapes)) if i not in dense]
        epsilon = left / sum(raw[i] * math.prod(shapes[i]) for i in sparse)
        largest = max(raw[i] for i in sparse)
        if epsilon * largest <= 1:
            return [Fraction(1) if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= {i for i in sparse if raw[i] == largest}


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    "shapes",
    [
        [(300, 784), (100, 300), (10, 100)],
        [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 16, 1, 1), (64, 32, 3, 3), (10, 64)],
        [(4, 4), (4, 4), (64, 64)],
    ],
)
def test_erk_follows_the_formula_and_solves_again_where_a_layer_is_dense(shapes, density):
    scores = draw(shapes)
    kept = math.floor(density * sum(map(math.prod, shapes)))
    shares = [d * math.prod(shape) for d, shape in zip(erk_densities(shapes, kept), shapes, strict=True)]
    counts = list(ERK(floor=0).divide(candidates(scores), kept).kept)
    assert counts == largest_remainder(shares, kept)


def test_erk_makes_some_layers_dense_in_the_cases_above():
    shapes = [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 16, 1, 1), (64, 32, 3, 3), (10, 64)]
    assert 0 < sum(d == 1 for d in erk_densities(shapes, sum(map(math.prod, shapes)) * 3 // 10)) < len(shapes)


def lamp_scores(score):
    """Lee et al.: the square over the sum of squares from that weight on, in rising order; one loop within another."""
    flat = score.flatten().double().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i], -i))
    result = torch.empty(len(flat), dtype=torch.float64)
    for rank, i in enumerate(order):
        rest = 0.0
        for j in reversed(order[rank:]):
            rest += flat[j] ** 2
        result[i] = flat[i] ** 2 / rest if rest else 0.0
    return result


def test_lamp_ranks_each_weight_against_the_larger_ones_of_its_layer():
    scores = draw([(8, 5), (3, 4, 2), (1, 1), (30,)])
    ranked = [lamp_scores(score) for score in scores]
    joined = torch.cat(ranked)
    for kept in range(4, len(joined) + 1):
        cut = joined.sort(descending=True).values[kept - 1]
        expected = [int((part >= cut).sum()) for part in ranked]
        assert list(LAMP(floor=0).divide(candidates(scores), kept).kept) == expected


def test_lamp_does_not_depend_on_the_scale_of_a_layer():
    scores = draw([(50,), (70,), (20,)])
    scaled = [score * factor for score, factor in zip(scores, (1e-6, 1.0, 1e6), strict=True)]
    for kept in (3, 40, 100):
        assert LAMP().divide(candidates(scores), kept).kept == LAMP().divide(candidates(scaled), kept).kept


def test_lamp_keeps_the_largest_weight_of_every_layer_first():
    scores = [torch.full((10,), 1e-9), torch.full((10,), 1e9), torch.tensor([1.0, 0, 0])]
    assert list(LAMP(floor=0).divide(candidates(scores), 3).kept) == [1, 1, 1]


def test_lamp_takes_a_layer_of_zeros_last_and_refuses_negative_scores():
    scores = [torch.zeros(4), torch.ones(6)]
    assert list(LAMP(floor=0).divide(candidates(scores), 6).kept) == [0, 6]
    assert list(LAMP(floor=0).divide(candidates(scores), 8).kept) == [2, 6]
    with pytest.raises(ValueError, match=r"needs them to be at least 0.* got -1.0. Use Global"):
        LAMP().divide(candidates([torch.tensor([1.0, -1.0])]), 1)


SHAPES = [(3, 4), (1,), (20, 2), (6, 2, 3, 3), (5,)]


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@pytest.mark.parametrize("available", [None, [5, 1, 40, 0, 3], [12, 0, 7, 108, 5]])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_integers_that_add_up_within_floor_and_available(allocation, available, tied):
    scores = [score.round() if tied else score for score in draw(SHAPES)]
    has = available or [score.numel() for score in scores]
    floor = max(allocation.floor, math.floor(getattr(allocation, "floor_share", 0) * 166 + 0.5))
    low = [min(floor, n) for n in has]
    for kept in range(sum(low), sum(has) + 1):
        counts = allocation.divide(candidates(scores, available), kept).kept
        assert sum(counts) == kept
        assert all(isinstance(count, int) and lo <= count <= n for count, lo, n in zip(counts, low, has, strict=True))


@pytest.mark.parametrize(
    "allocation", [Global(floor=3), Uniform(floor=3), ERK(floor=3), LAMP(floor=3), Global(floor_share=0.02)], ids=repr
)
def test_floors_that_exceed_what_is_kept_are_an_error_with_the_largest_sparsity(allocation):
    with pytest.raises(
        ValueError, match=r"Only 12 of 166 .* at least 13 in 5 tensors. .* leaves them is (0\.\d+)"
    ) as error:
        allocation.divide(candidates(draw(SHAPES)), 12)
    limit = float(error.value.args[0].split("leaves them is ")[1].split(":")[0])
    kept = 166 - math.floor(limit * 166 + 0.5)
    assert kept == 13
    assert sum(allocation.divide(candidates(draw(SHAPES)), kept).kept) == 13


@pytest.mark.parametrize("allocation", [Global, Uniform, ERK, LAMP])
def test_a_negative_floor_is_an_error(allocation):
    with pytest.raises(ValueError, match="floor=-1 is no number of weights"):
        allocation(floor=-1)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_floor_share_outside_its_range_is_an_error(share):
    with pytest.raises(ValueError, match=r"floor_share=.* lies in \[0, 1\)"):
        Global(floor_share=share)


def linears(*sizes, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList([nn.Linear(n, 1, bias=False) for n in sizes])


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
def test_masks_of_a_rising_schedule_are_nested_and_exact_while_the_weights_move(allocation):
    module = linears(6, 6, 2, 40, 17, 101)
    masks = Masks(Pruning(allocation=allocation))
    masks.bind(module)
    total = 172
    for pruned in range(0, 150):
        before = {name: mask.clone() for name, mask in masks.items()}
        masks.update(pruned / total)
        assert sum(masks.kept.values()) == total - pruned == sum(int(mask.sum()) for mask in masks.values())
        assert not any((masks[name] & ~before[name]).any() for name in masks)
        masks.apply_()
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)


def test_the_alabama_paradox_does_not_bring_weights_back():
    module = linears(6, 6, 2)
    scores = [parameter.detach().abs() for parameter in module.parameters()]
    free = [list(Uniform().divide(candidates(scores), kept).kept) for kept in (11, 10)]
    assert free == [[5, 5, 1], [4, 4, 2]]  # one weight less in all, one more in the last tensor
    masks = Masks(Pruning(allocation=Uniform()))
    masks.bind(module)
    masks.update(3 / 14)
    assert list(masks.kept.values()) == [5, 5, 1]
    masks.update(4 / 14)
    assert list(masks.kept.values()) == [5, 4, 1]
