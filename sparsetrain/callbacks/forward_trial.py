"""Whether `forward` can stand in for the training step, tried early in a fit."""

import copy
import math
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.recalibration import inputs_in, needs_recalibration
from sparsetrain.callbacks.trainer import has_compiled, is_compiled, train_loaders
from sparsetrain.modes import undisturbed

_MOST_SHIFT = 0.25  # of means, in standard deviations; augmentation moves them by less
_MOST_SCALE = 3.0  # of standard deviations

Moments = tuple[float, float]
"""Mean and standard deviation."""


class ForwardTrial:
    """Calls `forward` with the first part of a batch, as batch norm's recalibration will with many of them.

    That comes after whole rounds, too late to hear that it cannot work. What the first layer with parameters gets is
    compared with what it gets in the training step: a module that normalizes its batches there has a `forward` that
    sees raw ones, and is warned. It is a copy that is called, with the second batch: `forward` may keep something from
    call to call, and need what the first step has made. Modules that cannot be copied are not tried, nor are compiled
    ones; where anything has been compiled, nothing is compared, as a step might be compiled anew.

    Args:
        trainer: of the fit.
        pl_module: is trained.
        always: try it where all batch norm is frozen, too.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule, *, always: bool) -> None:
        self.trainer, self.pl_module, self._always = trainer, pl_module, always
        self._batches = 0
        self._handle: RemovableHandle | None = None
        self._given: Moments = (math.nan, math.nan)

    @classmethod
    def of(cls, trainer: L.Trainer, pl_module: L.LightningModule, *, always: bool = False) -> Self | None:
        """A trial, if `forward` will be called: for batch norm, or `always`, with batches that are those of one loader.

        Raises:
            ValueError: see `needs_recalibration`.
        """
        loaders = train_loaders(trainer)
        will_call = needs_recalibration(pl_module, loaders) or always
        is_bare = loaders[:1] == [trainer.train_dataloader]  # else batches come in a list or a dictionary of its own
        return cls(trainer, pl_module, always=always) if will_call and is_bare else None

    def begin_batch(self, batch: Any) -> None:
        """Look at `batch`, before its training step; called for each.

        Raises:
            ValueError: the first does not begin with a tensor, or `forward` fails with the second.
        """
        self.release()  # of a step that did not call the layer
        if self._batches == 2 or batch is None:  # that of a `dataloader_iter` is
            return
        self._batches += 1
        inputs = inputs_in(batch)
        if self._batches == 1 or is_compiled(self.pl_module):
            return
        norms = (part.training for part in self.pl_module.modules() if isinstance(part, _BatchNorm))
        first = self._try(inputs) if self._always or any(norms) else None
        if first is not None and not has_compiled():  # a compiled function may call the layer
            name, self._given = first
            self._handle = self.pl_module.get_submodule(name).register_forward_pre_hook(self._compare)

    def release(self) -> None:
        """Leave the module as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _try(self, inputs: Tensor) -> tuple[str, Moments] | None:
        """The layer that `forward` calls first of those with parameters, and what it is given, if that can be told."""
        found: list[tuple[str, Any]] = []
        handles: list[RemovableHandle] = []

        def note(name: str, args: tuple[Any, ...]) -> None:
            if not found:
                found.append((name, _moments(args, inputs)))

        # The module itself, too, is left as it is: it may be held by closures, or by a part that copies keep.
        with isolate_rng(), undisturbed(self.pl_module), self.trainer.precision_plugin.forward_context():
            try:
                module = self._copy()
            except Exception:  # it holds something that cannot be copied, such as an activation
                return None
            for name, layer in module.named_modules():
                own = next(layer.parameters(recurse=False), None)
                if name and own is not None and not isinstance(layer, torch.jit.ScriptModule):
                    handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args)))
            try:
                module(inputs.clone())
            except torch.OutOfMemoryError:  # of the copy
                return None
            except Exception as error:
                raise ValueError(
                    f"{type(module).__name__} is called outside of its training steps, too, with the first part of "
                    f"each training batch, here a tensor of {inputs.dtype} and shape {tuple(inputs.shape)}; its "
                    f"`forward` fails: {error}. Let the loader yield (inputs, targets), and `forward` take the inputs."
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        return found[0] if found and found[0][1] is not None else None

    def _copy(self) -> L.LightningModule:
        """A copy of the module that knows the Trainer and logs nothing."""
        module, live = copy.deepcopy(self.pl_module), set(self.pl_module.modules())
        for part in module.modules():
            if isinstance(part, L.LightningModule) and part not in live:
                part._trainer = self.trainer
                part.log = lambda *_, **__: None  # type: ignore[method-assign]
        return module

    def _compare(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._handle is None or not self.trainer.training:
            return
        self.release()
        own = _moments(args)
        if own is None:
            return
        (mean, deviation), (own_mean, own_deviation) = self._given, own
        low, high = sorted((deviation, own_deviation))
        if low > 0 and (abs(mean - own_mean) > _MOST_SHIFT * high or high > _MOST_SCALE * low):
            rank_zero_warn(
                f"The first layer of {type(self.pl_module).__name__} gets inputs of mean {own_mean:.3g} and standard "
                f"deviation {own_deviation:.3g} in `training_step`, but {mean:.3g} and {deviation:.3g} when the module "
                "is called with the same batch, as it will be for batch norm's statistics or for what the gates say. "
                "Normalize in `forward`, in the data or in on_after_batch_transfer, not in `training_step`."
            )


def _moments(args: tuple[Any, ...], like: Tensor | None = None) -> Moments | None:
    """Of the first argument; None if that is no tensor that has them, or not of as many elements as `like`."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.is_complex() or (like is not None and x.numel() != like.numel()):
        return None
    try:
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return float(x.mean()), float(x.std(correction=0))
    except RuntimeError:  # sparse, nested, or within vmap
        return None
