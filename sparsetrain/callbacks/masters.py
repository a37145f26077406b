"""The dense masters behind N:M weights: which modules hold one, and what a state dict leaves out of it."""

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor, nn

from sparsetrain import ops
from sparsetrain.callbacks.trainer import callbacks_of
from sparsetrain.mask_files import pack, unpack


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
    masks = {name: layer.mask for name, layer in ops.effective_layers(module)}
    return {
        name: {"mask": pack(masks[name]), "values": layer.weight.detach()[~masks[name]].cpu()}
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
