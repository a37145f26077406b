"""What callbacks ask a Trainer: Lightning sets some of its attributes where type checkers do not see them."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from sparsetrain.steps import RunLength


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The Trainer's callbacks, in the order in which it calls them."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def set_callbacks(trainer: L.Trainer, callbacks: Iterable[L.Callback]) -> None:
    """Give the Trainer other callbacks, in a new list: Lightning may be iterating over the old one."""
    trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the run is a trial of a few batches."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def has_scaler(trainer: L.Trainer) -> bool:
    """Whether gradients are scaled, so that steps may be skipped."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def train_loaders(trainer: L.Trainer) -> Iterator[Any]:
    """The training loaders, of which there may be several."""
    if trainer.train_dataloader is not None:
        yield from CombinedLoader(trainer.train_dataloader, "min_size").flattened


def run_length(trainer: L.Trainer) -> RunLength:
    """Optimizer steps in an epoch and in the run, of an optimizer that steps once per (accumulated) batch."""
    batches = trainer.num_training_batches
    accumulated = {trainer.accumulate_grad_batches}
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = set(callback.scheduling.values())  # it sets the Trainer's at the start of each epoch
    known = math.isfinite(batches) and len(accumulated) == 1
    steps_per_epoch = math.ceil(batches / accumulated.pop()) if known else None
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if steps_per_epoch is not None and trainer.max_epochs is not None and trainer.max_epochs != -1:
        limits.append(trainer.max_epochs * steps_per_epoch)
    return RunLength(steps_per_epoch, min(limits, default=None))
