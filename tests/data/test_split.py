import pytest
import torch

from sparsetrain.data.split import split_digest, stratified_split


def test_each_class_gives_its_share_to_within_one_and_the_sizes_are_exact():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 14 + [3] * 2)[torch.randperm(97)]
    for size in (0, 1, 10, 33, 96):
        rest, held_out = stratified_split(labels, size)
        assert len(held_out) == size
        assert sorted([*rest.tolist(), *held_out.tolist()]) == list(range(97))
        counts = torch.bincount(labels[held_out], minlength=4)
        assert (counts - size * torch.bincount(labels) / 97).abs().max() < 1


def test_equal_classes_are_held_out_equally_and_not_by_position():
    labels = torch.arange(1000) % 10
    rest, held_out = stratified_split(labels, 100)
    assert torch.bincount(labels[held_out]).tolist() == [10] * 10
    assert torch.equal(held_out, held_out.sort().values)
    assert torch.equal(rest, rest.sort().values)
    assert held_out.float().mean().sub(500).abs() < 100


def test_the_split_depends_on_no_global_state():
    labels = torch.arange(50) % 5
    torch.manual_seed(0)
    first = stratified_split(labels, 10)[1]
    torch.manual_seed(1)
    assert torch.equal(stratified_split(labels, 10)[1], first)


def test_the_digest_tells_values_and_boundaries_apart():
    a, b = torch.tensor([1, 2]), torch.tensor([3])
    assert split_digest(a, b) == split_digest(a.clone(), b.clone())
    others = [split_digest(b, a), split_digest(torch.tensor([1]), torch.tensor([2, 3])), split_digest(a)]
    assert len({split_digest(a, b), *others}) == 4


@pytest.mark.parametrize("size", [-1, 50])
def test_a_size_outside_the_data_is_refused(size):
    with pytest.raises(ValueError, match=rf"Cannot hold {size} of 50 samples out.*\[0, 50\)"):
        stratified_split(torch.arange(50) % 5, size)
