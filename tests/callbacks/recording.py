"""What the tests of rounds look at: copies of a run at each moment."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import lightning as L
from conformance.harness import PlainModule, Run, TinyModule, fit
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain import IterativeMagnitudePruning

EPOCH = 5  # steps; the task's data has 5 batches


@dataclass(frozen=True)
class Look:
    """Copies of what a run has at one moment.

    Args:
        module: its state dict.
        optimizer: its state, by parameter name.
        group: the numbers of its first parameter group.
        schedulers: their state dicts.
        masks: by parameter name.
        round: of the callback.
    """

    module: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    group: dict[str, Any]
    schedulers: list[dict[str, Any]]
    masks: dict[str, Tensor]
    round: int


class Record(L.Callback):
    """Looks at a run as each batch begins and ends; listed before the pruning it begins each batch before it.

    Attributes:
        starts, ends: by the number of batches made before.
        rates: (learning rate, momentum) of each optimizer step, by the same number.
        labels: of the samples in each batch.
        grads: with which the optimizer steps, by the same number and the parameter's name.
    """

    def __init__(self) -> None:
        self.starts: dict[int, Look] = {}
        self.ends: dict[int, Look] = {}
        self.rates: dict[int, tuple[float, float]] = {}
        self.labels: dict[int, list[int]] = {}
        self.grads: dict[int, dict[str, Tensor]] = {}
        self.handles: list[Any] = []

    def look(self, trainer: L.Trainer, module: L.LightningModule) -> Look:
        names = {parameter: name for name, parameter in module.named_parameters()}
        optimizer = trainer.optimizers[0]
        callback = next((c for c in trainer.callbacks if isinstance(c, IterativeMagnitudePruning)), None)
        return Look(
            deepcopy(dict(module.state_dict())),
            {names[parameter]: deepcopy(dict(state)) for parameter, state in optimizer.state.items()},
            {key: deepcopy(value) for key, value in optimizer.param_groups[0].items() if key != "params"},
            [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            {} if callback is None else deepcopy(dict(callback.masks)),
            0 if callback is None else callback.round,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def before_step(optimizer: Optimizer, *_: Any) -> None:
            place, group = trainer.fit_loop.total_batch_idx, optimizer.param_groups[0]
            self.rates[place] = group["lr"], group["momentum"] if "momentum" in group else group["betas"][0]

        self.handles = [trainer.optimizers[0].register_step_pre_hook(before_step)]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self.starts[trainer.fit_loop.total_batch_idx] = self.look(trainer, pl_module)
        self.labels[trainer.fit_loop.total_batch_idx] = batch[1].tolist()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.grads[trainer.fit_loop.total_batch_idx] = found

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.ends[trainer.fit_loop.total_batch_idx] = self.look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self.handles:
            handle.remove()


class RecordLast(Record, Checkpoint):
    """The same after every pruning: Lightning calls what is a `Checkpoint` last."""


def imp(rounds: int = 2, length: int | str = "2ep", **choices: Any) -> IterativeMagnitudePruning:
    """To 0.8, unless it says otherwise."""
    sparsity = {} if "per_round" in choices else {"sparsity": 0.8}
    return IterativeMagnitudePruning(rounds, length, check="full", **(sparsity | choices))


def recorded(
    callback: IterativeMagnitudePruning, *others: L.Callback, make: Callable[[], Any] = TinyModule, **settings: Any
) -> tuple[Run, Record]:
    """A fit of the callback's length, and what could be seen after each of its transitions."""
    record = RecordLast()
    if "max_steps" not in settings:
        settings = {"max_epochs": -1} | settings
    return fit(callback, *others, record, make=make, **settings), record


def masked(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.masked_fill(~masks[name], 0) if name in masks else t for name, t in tensors.items()}


class Quiet(PlainModule):
    """Without dropout and jitter: its gradients are a function of batch, weights and buffers."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.body[4] = nn.Identity()

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        self.seen = batch
        return batch


@cache
def one_round(make: Callable[[], Any], **settings: Any) -> dict[int, tuple[float, float]]:
    """The (learning rate, momentum) of each step of three epochs without any rounds."""
    record = Record()
    fit(record, make=make, **({"max_epochs": 3} | settings))
    return record.rates
