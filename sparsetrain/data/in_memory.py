"""The data module of image sets that fit on a device whole: train, val and test of one fixed split."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from sparsetrain.data.augment import Augmentation
from sparsetrain.data.loader import InMemoryLoader
from sparsetrain.data.split import split_digest, stratified_split


class Samples(NamedTuple):
    """Labelled raw images: uint8 [N, C, H, W] and int64 [N]."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Samples":
        """The samples at `index`, int64 [M]."""
        return Samples(self.images[index], self.labels[index])


class Splits(NamedTuple):
    """What a data module trains, chooses and reports on, and the digest of that choice of samples."""

    train: Samples
    val: Samples
    test: Samples
    digest: str


class InMemoryDataModule(L.LightningDataModule):
    """Base of the small image sets.

    A subclass gives `num_classes`, `input_shape` and `read`, and where it downloads, `prepare_data`. val is held out of
    the training images by a fixed stratified split that no seed changes. Loaders put their images on the Trainer's
    device (the CPU without a Trainer) and share them among its ranks; see `InMemoryLoader`.

    Args:
        batch_size: training samples in a batch on each rank, at least 1.
        eval_batch_size: the same for val and test; None takes `batch_size`.
        val_size: training images held out for val. With 0 all are trained on and there is no val loader (Lightning
            warns of it unless `limit_val_batches=0`): nothing may then be chosen by a validation metric.
        augment: changes of the raw training batch, in turn; val and test stay as they are.
        drop_last: leave the last, smaller training batch out.
        seed: of the order and augmentation of training batches.

    Raises:
        ValueError: a batch size below 1 or a negative `val_size`.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    """(channels, height, width) of an image."""

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
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("val_size", val_size, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.val_size = val_size
        self.augment = tuple(augment)
        self.drop_last = drop_last
        self.seed = seed

    def read(self) -> tuple[Samples, Samples]:
        """(training and validation images together, test images), on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must say how its images are read.")

    @cached_property
    def splits(self) -> Splits:
        """The samples of each split, read once."""
        samples, test = self.read()
        train, val = stratified_split(samples.labels, self.val_size)
        digest = split_digest(train, samples.labels[train], val, samples.labels[val], test.labels)
        return Splits(samples.take(train), samples.take(val), test, digest)

    @property
    def split_hash(self) -> str:
        """16 hexadecimal digits over the indices and labels of the split (reads the data unless `setup` has)."""
        return self.splits.digest

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.pixel_mean is not None and self.pixel_std is not None:
            return self.pixel_mean, self.pixel_std
        return channel_statistics(self.splits.train.images)

    def setup(self, stage: str) -> None:
        """Read and split the data, or raise what is wrong with its files."""
        _ = self.splits

    def train_dataloader(self) -> InMemoryLoader:
        """Shuffled and augmented batches (in a fixed order under the Trainer's `overfit_batches`)."""
        # Lightning can stop the shuffling of DataLoaders only.
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(
            self.splits.train,
            batch_size=self.batch_size,
            augment=self.augment,
            shuffle=not overfit,
            drop_last=self.drop_last,
        )

    def val_dataloader(self) -> InMemoryLoader | list[InMemoryLoader]:
        """Every validation sample once, or no loader if `val_size` is 0."""
        return self._loader(self.splits.val, batch_size=self.eval_batch_size) if self.val_size else []

    def test_dataloader(self) -> InMemoryLoader:
        """Every test sample once."""
        return self._loader(self.splits.test, batch_size=self.eval_batch_size)

    def _loader(
        self,
        samples: Samples,
        *,
        batch_size: int,
        augment: Sequence[Augmentation] = (),
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> InMemoryLoader:
        device, rank, world_size = torch.device("cpu"), 0, 1
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            # Not global_rank: ranks that share one model (tensor parallel) are one replica and must see the same data.
            if replica := self.trainer.distributed_sampler_kwargs:
                rank, world_size = replica["rank"], replica["num_replicas"]
        mean, std = self._statistics
        return InMemoryLoader(
            samples.images,
            samples.labels,
            batch_size=batch_size,
            mean=mean,
            std=std,
            augment=augment,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )


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
