"""Exactly resumable batches: the contract of our loaders, and the loader of images that live whole on a device."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from sparsetrain.data.augment import Augmentation
from sparsetrain.rng import generator


class EpochSampler:
    """Where Lightning writes the epoch (it calls `set_epoch` of samplers only, never of loaders)."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` (0-based) the one that the next iteration runs."""
        self.epoch = epoch


class ResumableLoader(ABC):
    """Batches (inputs [B, ...], targets [B, ...]) of B samples, each a fixed function of its place in the run.

    The order of an epoch is f(seed, epoch), and augmentation depends on the seed and the place of a batch or sample
    alone: a batch is the same whether the run came to it from the start or from a checkpoint, and the global generators
    are left alone. `state_dict()` is {"epoch", "batch"}: the epoch of the last batch handed out and how many it had
    handed out then, modulo `len(self)`. With a length, Lightning fetches no batch ahead, so these are the batches
    trained on.

    An iteration reads the epoch, the seed and the place to start at its first `next()`, not at `iter()`: Lightning
    calls `iter()` before it sets the epoch, and before it loads our state where `configure_optimizers` asks for
    `estimated_stepping_batches`. Only the first iteration after `load_state_dict` starts at the loaded place, and only
    in the loaded epoch; every other one starts at batch 0.

    On several ranks, position i of the epoch's order goes to rank i % world_size, and all ranks have equally many
    batches (DDP would wait forever otherwise). A shuffled loader repeats the first samples of the order until the
    ranks' shares are equal, as `DistributedSampler` does. One that is not shuffled, as for evaluation, repeats none:
    shares differ by at most one sample, and the last batches of a smaller share are made smaller where that keeps
    their number equal.

    Args:
        samples: in the data, at least 1.
        batch_size: samples in a batch on each rank, at least 1.
        shuffle: a new order each epoch; else that of the data.
        drop_last: leave out the last, smaller batch, and samples that do not divide among the ranks.
        seed: of order and augmentation.
        rank, world_size: which share of the data is ours.
        device: where batches are handed out.

    Raises:
        ValueError: a batch size below 1, a rank outside its world, or data too few for one batch on every rank.
    """

    batch_sampler = None  # Lightning looks for samplers here too

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside its world of {world_size}; it must be in [0, {world_size}).")
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self._samples, self._batches = samples, self._count_batches(samples)
        self.sampler = EpochSampler()
        self._epoch, self._batch, self._resuming = 0, 0, False
        self.reseed(seed)

    @abstractmethod
    def batches(self, share: Tensor, start: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches number `start` and after of an epoch, on `device`, as they are handed out.

        Args:
            share: int64 [M], the samples of the whole epoch on this rank; `self.part(share, b)` are those of batch b.
            start: in [0, len(self)).
            seed: of the augmentation, which may depend on the epoch, batch, sample and rank beside it.
            epoch: counted from `epoch0`.
        """

    def reseed(self, seed: int, epoch0: int = 0) -> None:
        """Give epoch e, from the next iteration on, the order and augmentation that `seed` gives epoch e - epoch0.

        A method of many rounds calls this as a round begins, with the round's own seed and `epoch0` = first epoch of
        the round minus the epoch of the recipe that it starts from. State keeps counting the Trainer's epochs; neither
        argument is in it, so call this again after a resume and before the first batch.
        """
        self.seed, self.epoch0 = seed, epoch0

    def fresh(self, seed: int) -> Self:
        """A loader of the same data with a seed and a place of its own, at batch 0 of epoch 0."""
        other = copy.copy(self)
        other.sampler = EpochSampler()
        other._epoch, other._batch, other._resuming = 0, 0, False
        other.reseed(seed)
        return other

    def state_dict(self) -> dict[str, int]:
        """The place after the last batch handed out: its epoch, and the batches of it so far modulo `len(self)`."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration begin at this place if it runs this epoch; in any other epoch it begins at batch 0.

        Raises:
            ValueError: the place lies beyond this loader's epoch.
        """
        epoch, batch = state_dict["epoch"], state_dict["batch"]
        if not 0 <= batch < len(self):
            raise ValueError(
                f"The checkpoint's loader had handed out {batch} batches of epoch {epoch}, but an epoch has "
                f"{len(self)} here. Resume with the data, batch size and number of ranks of the checkpoint."
            )
        self._epoch, self._batch, self._resuming = epoch, batch, True

    def __len__(self) -> int:
        """Batches in an epoch, equal on all ranks."""
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.sampler.epoch
        seed, local_epoch = self.seed, epoch - self.epoch0
        start = self._batch if self._resuming and self._epoch == epoch else 0
        self._resuming = False
        made = self.batches(self._share(seed, local_epoch), start, seed=seed, epoch=local_epoch)
        for index, batch in enumerate(made, start):
            self._epoch, self._batch = epoch, (index + 1) % len(self)
            yield batch

    def part(self, share: Tensor, batch: int) -> Tensor:
        """The samples of `batch` in a rank's share [M], so that each batch after it has at least one."""
        first, end = (min(b * self.batch_size, len(share) - (self._batches - b)) for b in (batch, batch + 1))
        return share[first:end]

    def _share(self, seed: int, epoch: int) -> Tensor:
        """Indices int64 of this rank's samples in the order of the epoch."""
        count = self._samples
        order = (
            torch.randperm(count, generator=generator(seed, "order", epoch)) if self.shuffle else torch.arange(count)
        )
        if self.drop_last:
            order = order[: count - count % self.world_size]
        elif self.shuffle:
            order = order[torch.arange(-(-count // self.world_size) * self.world_size) % count]
        return order[self.rank :: self.world_size]

    def _count_batches(self, samples: int) -> int:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; a batch has at least 1 sample.")
        if self.drop_last:
            batches = samples // self.world_size // self.batch_size
        else:
            batches = -(-samples // self.world_size // self.batch_size)
        smallest = -(-samples // self.world_size) if self.shuffle and not self.drop_last else samples // self.world_size
        if batches < 1 or smallest < batches:
            raise ValueError(
                f"{samples} samples do not give each of {self.world_size} rank(s) equally many batches of "
                f"{self.batch_size} with drop_last={self.drop_last}. Use fewer ranks, "
                + ("a smaller batch_size or drop_last=False." if batches < 1 else "or a batch_size of at least 2.")
            )
        return batches


class ImageLoader(ResumableLoader):
    """Batches of labelled images: (standardised float32 [B, C, H, W], int64 [B]).

    Args:
        samples: see `ResumableLoader`, as for the other arguments.
        channels: of an image.
        mean, std: per channel [C], in the unit of the raw pixels; a batch is (raw - mean) / std.

    Raises:
        ValueError: a mean or std for another number of channels, a std that is not positive, or what `ResumableLoader`
            refuses.
    """

    def __init__(
        self,
        samples: int,
        channels: int,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(mean) == len(std) == channels or min(std) <= 0:
            raise ValueError(
                f"mean {tuple(mean)} and std {tuple(std)} must each give one number for each of the "
                f"{channels} channels, and every std must be above 0."
            )
        super().__init__(
            samples,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        self._mean, self._std = (
            torch.tensor(list(row), dtype=torch.float32, device=device).view(-1, 1, 1) for row in (mean, std)
        )

    @abstractmethod
    def raw_batches(self, share: Tensor, start: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What `batches` standardises, of the same arguments: raw pixels uint8 [B, C, H, W] and int64 [B]."""

    def batches(self, share: Tensor, start: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.raw_batches(share, start, seed=seed, epoch=epoch):
            yield images.to(torch.float32).sub_(self._mean).div_(self._std), labels


class InMemoryLoader(ImageLoader):
    """Batches of images that live whole on a device; the augmentation of a batch is f(seed, epoch, its index, rank).

    Args:
        images: uint8 [N, C, H, W], N >= 1, raw pixels. Moved to `device` once.
        labels: int64 [N]. Moved with them.
        batch_size: see `ImageLoader`, as for the other arguments.
        augment: applied in turn to the raw batch.
        device: where the data lives and batches are made.

    Raises:
        ValueError: wrong shapes or dtypes, or what `ImageLoader` refuses.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[Augmentation] = (),
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_samples(images, labels)
        super().__init__(
            len(images),
            images.shape[1],
            batch_size=batch_size,
            mean=mean,
            std=std,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        self.images, self.labels = images.to(device), labels.to(device)
        self.augment = tuple(augment)

    def raw_batches(self, share: Tensor, start: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        share = share.to(self.device)
        for index in range(start, len(self)):
            chosen = self.part(share, index)
            images = self.images[chosen]
            if self.augment:
                stream = generator(seed, "augment", epoch, index, self.rank)
                for change in self.augment:
                    images = change(images, stream)
            yield images, self.labels[chosen]


def _check_samples(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; they must be raw pixels, torch.uint8 [N, C, H, W], "
            "with N at least 1."
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; they must be torch.int64 [{len(images)}], one an image."
        )
