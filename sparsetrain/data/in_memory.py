"""The data module of image sets that fit on a device whole."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.data.augment import Augmentation
from sparsetrain.data.loader import InMemoryLoader
from sparsetrain.data.module import Place, SplitDataModule, Splits
from sparsetrain.data.split import split_digest, stratified_split


class Samples(NamedTuple):
    """Labelled raw images: uint8 [N, C, H, W] and int64 [N]."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Samples":
        """The samples at `index`, int64 [M]."""
        return Samples(self.images[index], self.labels[index])


class InMemoryDataModule(SplitDataModule[Samples]):
    """Base of the small image sets, whose loaders put their images on the Trainer's device; see `InMemoryLoader`.

    A subclass gives `num_classes`, `input_shape` and `read`, and where it downloads, `prepare_data`. val is stratified.

    Args:
        batch_size: see `SplitDataModule`, as for the other arguments.
        augment: changes of the raw training batch, in turn; val and test stay as they are.
    """

    num_classes: int

    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    """Published statistics for each channel, in the unit of the raw pixels; None: those of the training images."""

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_size: int = 0,
        augment: Sequence[Augmentation] = (),
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            drop_last=drop_last,
            seed=seed,
        )
        self.augment = tuple(augment)

    def read(self) -> tuple[Samples, Samples]:
        """(training and validation images together, test images), on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must say how its images are read.")

    def split(self) -> Splits[Samples]:
        samples, test = self.read()
        train, val = stratified_split(samples.labels, self.val_size)
        digest = split_digest(train, samples.labels[train], val, samples.labels[val], test.labels)
        return Splits(samples.take(train), samples.take(val), test, digest)

    def loader(
        self, samples: Samples, place: Place, *, batch_size: int, train: bool, shuffle: bool, drop_last: bool
    ) -> InMemoryLoader:
        mean, std = self._statistics
        return InMemoryLoader(
            samples.images,
            samples.labels,
            batch_size=batch_size,
            mean=mean,
            std=std,
            augment=self.augment if train else (),
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            device=place.device,
        )

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.pixel_mean is not None and self.pixel_std is not None:
            return self.pixel_mean, self.pixel_std
        return channel_statistics(self.splits.train.images)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel of uint8 images [N, C, H, W], in raw pixel units.

    Taken from an exact count of each of the 256 values, so the result does not depend on summation order or threads.
    """
    values = torch.arange(256, dtype=torch.float64)
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float((share * values).sum()))
        std.append(float((share * (values - mean[-1]).square()).sum().sqrt()))
    return tuple(mean), tuple(std)
