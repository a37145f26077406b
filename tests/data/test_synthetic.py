import pytest
import torch

from sparsetrain.data import Flip, Shift, Synthetic


def test_images_have_the_asked_shape_sizes_and_balanced_classes():
    data = Synthetic((2, 6, 9), 7, train_size=70, val_size=14, test_size=20)
    train, val, test, _ = data.splits
    assert data.input_shape == (2, 6, 9)
    assert data.num_classes == 7
    assert train.images.dtype == torch.uint8
    assert [tuple(split.images.shape) for split in (train, val, test)] == [(n, 2, 6, 9) for n in (70, 14, 20)]
    assert torch.bincount(train.labels).tolist() == [10] * 7
    assert torch.bincount(val.labels).tolist() == [2] * 7
    counts = torch.bincount(test.labels)
    assert counts.max() - counts.min() == 1


def test_images_depend_on_the_data_seed_and_not_on_the_run_seed():
    first, second, third = (Synthetic(seed=s, data_seed=d).splits for s, d in ((0, 0), (1, 0), (0, 1)))
    assert torch.equal(first.train.images, second.train.images)
    assert first.digest == second.digest
    assert not torch.equal(first.train.images, third.train.images)


def test_a_nearest_class_mean_learns_it():
    train, _, test, _ = Synthetic((3, 16, 16), 10, noise=0.5).splits
    means = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(10)])
    found = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (found == test.labels).float().mean() > 0.95


def test_without_noise_a_class_is_one_image_and_classes_differ():
    train = Synthetic((1, 8, 8), 5, train_size=20, noise=0.0).splits.train
    assert len(torch.unique(train.images, dim=0)) == 5


@pytest.mark.parametrize(
    "options",
    [{"shape": (3, 0, 4)}, {"shape": (3, 4)}, {"num_classes": 1}, {"train_size": 0}, {"test_size": 0}, {"noise": -1.0}],
)
def test_arguments_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match="num_classes at least 2"):
        Synthetic(**options)


def test_augmentation_is_an_option():
    assert Synthetic().augment == ()
    assert Synthetic(shift=1, flip=True).augment == (Shift(1), Flip())
