"""The base of our data modules: train, val and test of one fixed split, and who gets which share of them."""

from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import lightning as L
import torch

from sparsetrain.data.loader import ResumableLoader

S = TypeVar("S")


class Splits(NamedTuple, Generic[S]):
    """What a data module trains, chooses and reports on, and the digest of that choice of samples."""

    train: S
    val: S
    test: S
    digest: str


class Place(NamedTuple):
    """Where the batches of a process go, and which share of the data they come from."""

    device: torch.device
    rank: int
    world_size: int


class SplitDataModule(L.LightningDataModule, Generic[S]):
    """Base of the data modules: the loaders of three fixed splits.

    A subclass gives `num_classes`, `input_shape`, `split` and `loader`, and where it downloads, `prepare_data`. val is
    held out of the training data by a fixed split that no seed changes. Loaders hand their batches out on the Trainer's
    device (the CPU without a Trainer) and share them among its ranks; see `ResumableLoader`.

    Args:
        batch_size: training samples in a batch on each rank, at least 1.
        eval_batch_size: the same for val and test; None takes `batch_size`.
        val_size: training samples held out for val. With 0 all are trained on and there is no val loader (Lightning
            warns of it unless `limit_val_batches=0`): nothing may then be chosen by a validation metric.
        drop_last: leave the last, smaller training batch out.
        seed: of the order and augmentation of training batches.

    Raises:
        ValueError: a batch size below 1 or a negative `val_size`.
    """

    input_shape: tuple[int, ...]
    """Of one input: (channels, height, width) of an image, (context,) of a text."""
    input_dtype: torch.dtype = torch.float32
    """Of a batch's inputs."""

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_size: int = 0,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.val_size = val_size
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("val_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        self.drop_last = drop_last
        self.seed = seed

    def split(self) -> Splits[S]:
        """Read the data and divide it."""
        raise NotImplementedError(f"{type(self).__name__} must say how its data is read and split.")

    def loader(
        self, samples: S, place: Place, *, batch_size: int, train: bool, shuffle: bool, drop_last: bool
    ) -> ResumableLoader:
        """Batches of `samples`, augmented if `train`."""
        raise NotImplementedError(f"{type(self).__name__} must say how its batches are made.")

    @cached_property
    def splits(self) -> Splits[S]:
        """The samples of each split, read once."""
        return self.split()

    @property
    def split_hash(self) -> str:
        """16 hexadecimal digits that name the samples of each split (reads the data unless `setup` has)."""
        return self.splits.digest

    def setup(self, stage: str) -> None:
        """Read and split the data, or raise what is wrong with its files."""
        _ = self.splits

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled and augmented batches (in a fixed order under the Trainer's `overfit_batches`)."""
        # Lightning can stop the shuffling of DataLoaders only.
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self.loader(
            self.splits.train,
            self._place(),
            batch_size=self.batch_size,
            train=True,
            shuffle=not overfit,
            drop_last=self.drop_last,
        )

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Every validation sample once, or no loader if `val_size` is 0."""
        return self._evaluation(self.splits.val) if self.val_size else []

    def test_dataloader(self) -> ResumableLoader:
        """Every test sample once."""
        return self._evaluation(self.splits.test)

    def _evaluation(self, samples: S) -> ResumableLoader:
        return self.loader(
            samples, self._place(), batch_size=self.eval_batch_size, train=False, shuffle=False, drop_last=False
        )

    def _place(self) -> Place:
        if self.trainer is None:
            return Place(torch.device("cpu"), rank=0, world_size=1)
        # Not global_rank: ranks that share one model (tensor parallel) are one replica and must see the same data.
        replica = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return Place(self.trainer.strategy.root_device, replica["rank"], replica["num_replicas"])
