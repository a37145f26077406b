"""Batch norm's statistics anew, from the training data as the module sees it."""

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from sparsetrain import soups
from sparsetrain.callbacks.trainer import generators_of
from sparsetrain.rng import derive_seed
from sparsetrain.snapshot import Snapshot

MOST_IMAGES = 10_000


def recalibrate(trainer: L.Trainer, pl_module: L.LightningModule, loaders: list[Any], seed: int) -> None:
    """`soups.recalibrate` with a fifth of the batches of the training loader, until 10,000 inputs have been seen.

    Of a loader without a length it is so many inputs, or all. Neither the loader's place nor any random stream is
    moved, and within a fit layers in evaluation mode keep their statistics. On several ranks each looks at its share of
    the data, and the first one's statistics are taken.

    Args:
        trainer: moves the batches and sets the precision.
        pl_module: is called with the first part of each batch, or with a batch that is a tensor.
        loaders: for training; one, if there is batch norm.
        seed: the run's, from which the order and augmentation of loaders that have `fresh` come, each time the same;
            for others they come from the global generators.

    Raises:
        ValueError: several loaders, or a batch that does not begin with a tensor.
    """
    if not needs_recalibration(pl_module, loaders):
        return
    length = sized_len(loaders[0])
    with isolate_rng(), trainer.precision_plugin.forward_context():
        limit = None if length is None else -(-length // 5)
        fifth = islice(inputs_of(trainer, pl_module, fresh(loaders[0], derive_seed(seed, "recalibration"))), limit)
        # In training, those that the user has put into evaluation mode keep what they were trained with.
        frozen = {layer for layer in pl_module.modules() if trainer.training and not layer.training}
        soups.recalibrate(pl_module, fifth, images=MOST_IMAGES, frozen=frozen)
    if trainer.world_size > 1:
        trainer.strategy.broadcast(Snapshot.of(pl_module)).restore_(pl_module)


def needs_recalibration(pl_module: L.LightningModule, loaders: list[Any]) -> bool:
    """Whether there is batch norm.

    Raises:
        ValueError: there is, and not one loader, or no `forward` to call.
    """
    if not any(isinstance(layer, _BatchNorm) for layer in pl_module.modules()):
        return False
    if len(loaders) != 1:
        raise ValueError(
            f"Batch norm is recalibrated with the batches of one training loader; there are {len(loaders)}. Give one."
        )
    if not is_overridden("forward", pl_module):
        raise ValueError(f"Batch norm is recalibrated by calling {type(pl_module).__name__}: give it a `forward`.")
    return True


class Recalibration(L.Callback):
    """Recalibrates before each evaluation, so that networks that are compared are all alike in it.

    Args:
        datamodule: whose training data is looked at.
        seed: see `recalibrate`.
    """

    def __init__(self, datamodule: L.LightningDataModule, seed: int) -> None:
        self.datamodule, self.seed = datamodule, seed

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        recalibrate(trainer, pl_module, [self.datamodule.train_dataloader()], self.seed)

    on_test_start = on_validation_start


def inputs_of(trainer: L.Trainer, pl_module: L.LightningModule, batches: Iterable[Any]) -> Iterator[Tensor]:
    """The first part of each batch, or a batch that is a tensor, on the module's device.

    Raises:
        ValueError: a batch that does not begin with a tensor.
    """
    for batch in batches:
        # The private form calls the hook of a data module that has one, as `batch_to_device` does with the other hooks.
        batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        yield inputs_in(batch)


def inputs_in(batch: Any) -> Tensor:
    """The first part of a batch, or a batch that is a tensor.

    Raises:
        ValueError: it does not begin with a tensor.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"A batch of the training loader is a {type(batch).__name__} that does not begin with a tensor of inputs, "
            "with which the module is called outside of its training steps, too. Let the loader yield (inputs, "
            "targets)."
        )
    return inputs


def fresh(loader: Any, seed: int) -> Iterator[Any]:
    """An iteration that leaves the loader as it is.

    Args:
        loader: of batches.
        seed: of the order and augmentation of a loader that has `fresh`.
    """
    if hasattr(loader, "fresh"):
        yield from loader.fresh(seed)
        return
    own = generators_of(loader)
    states = [stream.get_state() for stream in own]
    anew = copy.copy(loader)
    if isinstance(anew, DataLoader):
        anew._iterator = None  # of persistent workers, which one iteration at a time may use
    try:
        yield from anew
    finally:
        for stream, state in zip(own, states, strict=True):
            stream.set_state(state)
