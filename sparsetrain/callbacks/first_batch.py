"""Whether `forward` can stand in for the training step, tried with the first batch of a fit."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.recalibration import inputs_in
from sparsetrain.callbacks.trainer import is_compiled
from sparsetrain.modes import undisturbed

_MOST_SHIFT = 0.25  # of means, in standard deviations; augmentation moves them by less
_MOST_SCALE = 2.0  # of standard deviations


class FirstBatch:
    """Calls `forward` with the first part of the first batch, as batch norm's recalibration will with many of them.

    That comes after whole rounds, too late to hear that it cannot work. What the first layer with parameters gets is
    compared with what it gets in the training step: one that normalizes its batch itself leaves `forward` with raw
    ones, and warns. Nothing of the module is different afterwards. In compiled modules nothing is compared: they would
    be compiled anew.

    Args:
        trainer: of the fit.
        pl_module: is trained.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self._is_due = True
        self._handle: RemovableHandle | None = None

    def look(self, batch: Any) -> None:
        """Try `batch`, before its training step, if it is the first one; called for each.

        Raises:
            ValueError: it does not begin with a tensor, or `forward` fails.
        """
        self.release()  # of a first step that did not call the layer
        if not self._is_due or batch is None:  # that of a `dataloader_iter` is
            return
        self._is_due = False
        first = self._first_layer(inputs_in(batch))
        if first is not None and not is_compiled(self.pl_module):
            layer, given = first
            self._handle = layer.register_forward_pre_hook(lambda _, inputs: self._compare(given, inputs))

    def release(self) -> None:
        """Leave the module as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _first_layer(self, inputs: Tensor) -> tuple[nn.Module, tuple[float, float]] | None:
        """The layer that `forward` calls first of those with parameters, and mean and deviation of its input."""
        found: list[tuple[nn.Module, tuple[float, float]]] = []

        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if not found and args and isinstance(args[0], Tensor):
                found.append((layer, _moments(args[0])))

        layers = [part for part in self.pl_module.modules() if next(part.parameters(recurse=False), None) is not None]
        handles = [layer.register_forward_pre_hook(look) for layer in layers]
        try:
            with isolate_rng(), undisturbed(self.pl_module), self.trainer.precision_plugin.forward_context():
                self.pl_module(inputs)
        except Exception as error:
            raise ValueError(
                f"{type(self.pl_module).__name__} is called outside of its training steps, too, with the first part of "
                f"each training batch, here a tensor of {inputs.dtype} and shape {tuple(inputs.shape)}; its `forward` "
                f"fails: {error}. Let the loader yield (inputs, targets), and `forward` take the inputs."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None

    def _compare(self, forward: tuple[float, float], args: tuple[Any, ...]) -> None:
        if not self.trainer.training or not args or not isinstance(args[0], Tensor):
            return
        self.release()
        (mean, deviation), (own_mean, own_deviation) = forward, _moments(args[0])
        low, high = sorted((deviation, own_deviation))
        if abs(mean - own_mean) > _MOST_SHIFT * high or high > _MOST_SCALE * low:
            rank_zero_warn(
                f"The first layer of {type(self.pl_module).__name__} gets inputs of mean {own_mean:.3g} and standard "
                f"deviation {own_deviation:.3g} in `training_step`, but {mean:.3g} and {deviation:.3g} when the module "
                "is called with the same batch, as it will be for batch norm's statistics or for what the gates say. "
                "Normalize in `forward`, in the data or in on_after_batch_transfer, not in `training_step`."
            )


def _moments(x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over all of a tensor."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)) if not x.is_complex() else x.detach().abs().float()
    return float(x.mean()), float(x.std(correction=0))
