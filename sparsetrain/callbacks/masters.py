"""The dense masters behind N:M weights: what moves them, which modules hold one, what a state dict leaves out of it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain import ops
from sparsetrain.callbacks.follower import Arguments, OptimizerFollower
from sparsetrain.callbacks.trainer import callbacks_of
from sparsetrain.mask_files import pack, unpack
from sparsetrain.masks import Masks


class MasterFollower(OptimizerFollower):
    """Tells when optimizers have moved masters.

    Args:
        masks: of the N:M weights.
        optimizers: of the Trainer.
        on_move: called after each step, and between the calls of the closure within one, as LBFGS makes them.
        on_step: called after each step of `counted`.

    Raises:
        ValueError: no optimizer holds a master.
    """

    def __init__(
        self,
        masks: Masks,
        optimizers: Sequence[Optimizer],
        *,
        on_move: Callable[[], None],
        on_step: Callable[[], None],
    ) -> None:
        self._on_move = on_move
        super().__init__(masks, optimizers, what="N:M weights", on_step=on_step)

    def begins(self, optimizer: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Arguments:
        super().begins(optimizer, arguments, settings)
        closure, calls = settings.get("closure"), count()
        if closure is None:
            return None

        def renewed() -> Any:
            if next(calls):
                self._on_move()
            return closure()

        return arguments, settings | {"closure": renewed}

    def moved(self, optimizer: Optimizer) -> None:
        self._on_move()


def copies_of(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, nn.Module]:
    """The module under "", and the copies of it that callbacks keep, such as averages, by where they lie."""
    live = set(pl_module.modules())
    found: dict[str, nn.Module] = {"": pl_module}
    for callback in callbacks_of(trainer):
        for name, value in vars(callback).items():
            if isinstance(value, nn.Module) and any(layer not in live for _, layer in ops.effective_layers(value)):
                found[f"{callback.state_key}.{name}"] = value
    return found


def pruned_of(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer name -> what its state dict leaves out of the master: the mask, packed, and the values where it is not."""
    return {
        name: {"mask": pack(mask := layer.mask), "values": layer.weight.detach()[~mask].cpu()}
        for name, layer in ops.effective_layers(module)
    }


@torch.no_grad()
def add_pruned_(module: nn.Module, pruned: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what `pruned_of` has kept; nothing for a module that was dense then."""
    layers = dict(ops.effective_layers(module))
    for name, kept in pruned.items():
        weight = layers[name].weight
        mask = unpack(kept["mask"], weight.shape).to(weight.device)
        weight[~mask] = kept["values"].to(weight.device)


def pruned_masters(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """`pruned_of` the module and of its copies, by where they lie."""
    return {key: pruned_of(module) for key, module in copies_of(trainer, pl_module).items()}


def restore_masters_(saved: Mapping[str, Any], copies: Mapping[str, nn.Module]) -> None:
    """Put back what `pruned_masters` has kept.

    Raises:
        ValueError: it has kept some of a copy that is not there.
    """
    if lost := sorted(saved.keys() - copies.keys()):
        raise ValueError(
            f"The checkpoint holds a copy of the weights that no callback has now: {lost[0]}. "
            "Resume a run with the callbacks it was trained with."
        )
    for key, pruned in saved.items():
        add_pruned_(copies[key], pruned)
