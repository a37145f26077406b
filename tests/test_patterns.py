import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.allocation import ERK, LAMP, Global, Uniform
from sparsetrain.masks import Masks, Pruning, prune
from sparsetrain.patterns import NM, Channel, Pattern, TransposableNM, Unstructured
from sparsetrain.selection import Selection
from sparsetrain.transposable import tile_patterns


@dataclass(frozen=True)
class TwoOfFour(Pattern):
    """In each 4 neighbours of a row the best 2: one count for each shape."""

    def reachable(self, shape: torch.Size, kept: int) -> int:
        if shape[-1] % 4:
            raise ValueError(f"TwoOfFour needs rows divisible by 4; got shape {tuple(shape)}. Add it to `exclude`.")
        return shape.numel() // 2

    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        groups = score.reshape(-1, 4)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, :2]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(score.shape)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Runs of `size` neighbours in a row, kept or dropped together."""

    size: int

    def reachable(self, shape: torch.Size, kept: int) -> int:
        if shape[-1] % self.size:
            raise ValueError(f"Blocks({self.size}) does not fit shape {tuple(shape)}. Add it to `exclude`.")
        return (kept + self.size // 2) // self.size * self.size

    def mask(self, score: Tensor, kept: int, cut: float | None = None) -> Tensor:
        best = score.reshape(-1, self.size).sum(1).argsort(descending=True, stable=True)[: kept // self.size]
        mask = torch.zeros(score.numel() // self.size, self.size, dtype=torch.bool)
        mask[best] = True
        return mask.view(score.shape)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 12, bias=False), nn.Linear(12, 20, bias=False), nn.Linear(20, 4, bias=False))


def bound(pattern, module, allocation=Global()):
    masks = Masks(Pruning(pattern=pattern, allocation=allocation))
    masks.bind(module)
    return masks


def test_unstructured_reaches_every_count():
    shape = torch.Size((3, 5))
    assert [Unstructured().reachable(shape, kept) for kept in range(16)] == list(range(16))
    score = torch.arange(15.0).view(3, 5)
    for kept in range(16):
        assert torch.equal(Unstructured().mask(score, kept), score >= 15 - kept)
        assert torch.equal(Unstructured().mask(score, kept, cut=7.0), score >= 15 - kept)


@pytest.mark.parametrize("allocation", [Global(), Uniform(), ERK(), LAMP()], ids=repr)
def test_a_pattern_with_one_count_gives_it_to_every_tensor(allocation):
    module = mlp()
    masks = prune(module, 0.5, Pruning(pattern=TwoOfFour(), allocation=allocation))
    for name, mask in masks.items():
        weight = module.get_parameter(name)
        assert (mask.view(-1, 4).sum(1) == 2).all()
        assert masks.kept[name] == weight.numel() // 2 == int((weight != 0).sum())
    assert masks.sparsity() == 0.5


def test_n_of_m_keeps_the_best_of_each_group_while_the_weights_move():
    module = mlp()
    masks = bound(TwoOfFour(), module)
    for _ in range(3):
        expected = {}
        for name in masks:
            groups = module.get_parameter(name).detach().abs().view(-1, 4)
            expected[name] = groups >= groups.sort(dim=1, descending=True).values[:, 1:2]
        masks.update(0.5, regrow=True)
        assert all(torch.equal(masks[name].view(-1, 4), mask) for name, mask in expected.items())
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("allocation", [Global(floor=0), Uniform(floor=0), ERK(floor=0), LAMP(floor=0)], ids=repr)
def test_each_tensor_gets_the_reachable_count_nearest_to_its_share(allocation):
    module = mlp()
    for sparsity in (0.0, 0.3, 0.5, 0.77, 0.9):
        fine, coarse = bound(Unstructured(), module, allocation), bound(Blocks(4), module, allocation)
        fine.update(sparsity)
        coarse.update(sparsity)
        for name in fine:
            assert coarse.kept[name] % 4 == 0
            assert abs(coarse.kept[name] - fine.kept[name]) <= 2
            assert coarse.kept[name] == int(coarse[name].sum())


@pytest.mark.slow
@pytest.mark.parametrize("allocation", [Global(floor=4), Uniform(floor=4), ERK(floor=4), LAMP(floor=4)], ids=repr)
def test_block_masks_are_nested_over_a_schedule_that_rises_by_less_than_a_block(allocation):
    module = mlp()
    masks = bound(Blocks(4), module, allocation)
    total = masks.total
    for pruned in range(0, total - 30):
        before = {name: mask.clone() for name, mask in masks.items()}
        masks.update(pruned / total)
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()
            blocks = mask.view(-1, 4)
            assert torch.equal(blocks.any(1), blocks.all(1))
        assert abs(sum(masks.kept.values()) - (total - pruned)) <= 4 * len(masks)
        masks.apply_()
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


def test_rounding_to_blocks_does_not_hide_a_sparsity_that_falls():
    masks = bound(Blocks(4), mlp())
    masks.update(0.5)
    with pytest.raises(ValueError, match=r"lies below the present"):
        masks.update(0.49)


def test_a_schedule_with_blocks_goes_on_after_a_resume():
    module = mlp()
    first, second = bound(Blocks(4), module), bound(Blocks(4), module)
    total = first.total
    for pruned in range(100, 140):
        first.update(pruned / total)
        second.load_state_dict(first.state_dict())
        first.update((pruned + 1) / total)
        second.update((pruned + 1) / total)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_error_of_a_pattern_that_does_not_fit_comes_at_bind():
    with pytest.raises(ValueError, match=r"TwoOfFour needs rows divisible by 4; got shape \(3, 6\)"):
        bound(TwoOfFour(), nn.Linear(6, 3))
    where = Selection(exclude=("0.*",))
    masks = Masks(Pruning(where, pattern=TwoOfFour()))
    masks.bind(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    assert list(masks) == ["1.weight"]


def test_marked_scores_come_last_in_a_pattern():
    score = torch.tensor([[1.0, -math.inf, -math.inf, 0.5]])
    assert TwoOfFour().mask(score, 2).tolist() == [[True, False, False, True]]


def best_tile_by_brute_force(score, n, m):
    """The best of all m x m tiles with row and column sums n, the first in lexicographic order of kept places."""
    tiles = [
        torch.tensor(tile, dtype=torch.bool)
        for tile in itertools.product(itertools.product([1, 0], repeat=m), repeat=m)
        if all(sum(row) == n for row in tile) and all(sum(column) == n for column in zip(*tile, strict=True))
    ]
    kept = [float(score.double()[tile].sum()) for tile in tiles]
    return tiles[kept.index(max(kept))]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 3), (2, 3)])
def test_a_transposable_mask_keeps_the_best_sum_of_every_tile(n, m):
    for score in (torch.randint(0, 4, (2 * m, m)).float(), torch.rand(2 * m, m)):
        mask = TransposableNM(n, m).mask(score, 2 * m * n)
        assert torch.equal(mask[:m], best_tile_by_brute_force(score[:m], n, m))
        assert torch.equal(mask[m:], best_tile_by_brute_force(score[m:], n, m))


def test_there_are_90_patterns_of_two_in_four_in_both_directions():
    choices, patterns = tile_patterns(2, 4)
    assert len(patterns) == len(choices) == 90
    assert len({tuple(pattern.flatten().tolist()) for pattern in patterns}) == 90
    assert (patterns.sum(1) == 2).all()
    assert (patterns.sum(2) == 2).all()


@pytest.mark.parametrize("shape", [(8, 12), (8, 4, 3, 3), (8, 4, 2)])
def test_masks_hold_n_of_m_along_their_axes_at_every_kernel_position(shape):
    score = torch.rand(shape)
    score[score < 0.3] = 0.0
    score[score > 0.9] = -math.inf
    for pattern, axes in ((NM(1, 4, 0), [0]), (NM(3, 4, 1), [1]), (TransposableNM(2, 4), [0, 1])):
        mask = pattern.mask(score, pattern.reachable(score.shape, 0))
        assert int(mask.sum()) == pattern.reachable(score.shape, 0)
        for axis in axes:
            assert (mask.movedim(axis, -1).reshape(-1, 4).sum(1) == pattern.n).all()
        transposed = score.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(pattern.mask(transposed, int(mask.sum())), mask)


def test_nm_agrees_with_two_of_four_and_prunes_in_one_shot():
    score = torch.randint(0, 3, (6, 16)).float()
    assert torch.equal(NM(2, 4).mask(score, 48), TwoOfFour().mask(score, 48))
    module = mlp()
    masks = prune(module, 0.5, Pruning(pattern=NM(2, 4, axis=0)))
    assert all((mask.t().reshape(-1, 4).sum(1) == 2).all() for mask in masks.values())
    masks = prune(mlp(), 0.5, Pruning(pattern=TransposableNM()))
    assert masks.sparsity() == 0.5


def test_nm_masks_are_nested_without_regrowing():
    module = mlp()
    masks = bound(NM(2, 4), module)
    masks.update(0.5)
    before = {name: mask.clone() for name, mask in masks.items()}
    masks.apply_()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    masks.update(0.5)
    assert all(torch.equal(masks[name], before[name]) for name in masks)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(6, 4), (5, 6, 3, 3), (4, 3, 2)])
def test_channels_are_kept_whole_by_the_sum_of_their_scores(axis, shape):
    score = torch.randn(shape).add_(torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))]))
    score = score[tuple(torch.randperm(n) for n in shape[:1])]
    size = score.numel() // shape[axis]
    sums = [float(score.select(axis, i).double().sum()) for i in range(shape[axis])]
    for kept in range(score.numel() + 1):
        count = Channel(axis).reachable(score.shape, kept)
        possible = range(0 if kept == 0 else size, score.numel() + 1, size)
        assert count in possible
        assert abs(count - kept) == min(abs(other - kept) for other in possible)
        mask = Channel(axis).mask(score, count)
        best = sorted(range(shape[axis]), key=lambda i: -sums[i])[: count // size]
        assert [bool(mask.select(axis, i).all()) for i in range(shape[axis])] == [i in best for i in range(shape[axis])]
        assert int(mask.sum()) == count


def test_filters_with_the_smallest_l1_norms_are_pruned_and_the_lower_of_equal_ones_is_kept():
    module = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(
            torch.tensor([[2.0, -2.0], [0.0, 3.5], [1.0, 3.0], [-1.0, 0.0]])
        )  # by L2, row 1 before row 0
    assert prune(module, 0.5, Pruning(pattern=Channel()))["weight"].any(1).tolist() == [True, False, True, False]
    assert Channel().mask(torch.ones(4, 2), 4).any(1).tolist() == [True, True, False, False]


def test_channels_stay_nested_and_no_tensor_is_emptied():
    module = mlp()
    masks = bound(Channel(), module)
    for sparsity in (0.3, 0.6, 0.9, 0.98):
        before = {name: mask.clone() for name, mask in masks.items()}
        masks.update(sparsity)
        masks.apply_()
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()
            assert torch.equal(mask.any(1), mask.all(1))
            assert mask.any()
            module.get_parameter(name).data.add_(torch.randn(mask.shape), alpha=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Channel(2), r"axis=2 of Channel must be 0 \(output channels\) or 1"),
        (lambda: Channel().reachable(torch.Size((8,)), 4), r"Channel\(axis=0\) needs weights of at least 2 dimensions"),
        (lambda: NM(4, 4), r"n=4 of m=4 must satisfy 1 <= n < m"),
        (lambda: NM(0, 4), r"n=0 of m=4"),
        (lambda: NM(2, 4, axis=2), r"axis=2 of NM must be 1 \(the input dimension\) or 0"),
        (lambda: TransposableNM(4, 8), r"m=8 of TransposableNM must be at most 5"),
        (
            lambda: NM(2, 4).reachable(torch.Size((8, 6)), 0),
            r"an input dimension \(axis 1\) divisible by 4; got .*8, 6",
        ),
        (lambda: NM(2, 4, 0).reachable(torch.Size((6, 8)), 0), r"an output dimension \(axis 0\) divisible by 4"),
        (lambda: NM(2, 4).reachable(torch.Size((8,)), 0), r"got shape \(8,\). Add it to `exclude`"),
        (lambda: TransposableNM().reachable(torch.Size((8, 6)), 0), r"an input dimension"),
    ],
)
def test_errors_of_group_patterns_name_the_value_and_the_limit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("axis", [0, 1])
def test_whole_channels_of_an_empty_weight_are_none(axis):
    shape = torch.Size([0, 4])
    assert Channel(axis).reachable(shape, 0) == 0
    assert Channel(axis).mask(torch.zeros(shape), 0).shape == shape


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 4, axis=0), TransposableNM(2, 4)])
def test_a_tensor_without_elements_has_a_mask_without_elements(pattern):
    mask = pattern.mask(torch.empty(0, 8), pattern.reachable(torch.Size((0, 8)), 0))
    assert (mask.shape, mask.dtype) == ((0, 8), torch.bool)
