import torch

from sparsetrain.data import Digits


def test_digits_has_1000_200_597_samples_of_stratified_classes_and_a_split_that_never_changes():
    data = Digits(seed=5)
    train, val, test, _ = data.splits
    assert [len(split.labels) for split in (train, val, test)] == [1000, 200, 597]
    shares = [torch.bincount(split.labels) / len(split.labels) for split in (train, val, test)]
    assert max((a - b).abs().max() for a in shares for b in shares) < 0.01
    assert data.split_hash == "5fc4bddc0c1e6775"  # tables of runs name it: another one is another split
    assert Digits(seed=6).split_hash == data.split_hash


def test_training_images_are_standardised_by_their_own_statistics():
    data = Digits(shift=0)
    images = torch.cat([images for images, _ in data.train_dataloader()])
    assert images.shape == (1000, *data.input_shape)
    assert abs(images.mean()) < 1e-5
    assert abs(images.std(correction=0) - 1) < 1e-5
