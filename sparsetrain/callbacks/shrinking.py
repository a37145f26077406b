"""A smaller network in the midst of a fit: what was cut off is removed, and the same fit goes on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.fixed import FixedMasks
from sparsetrain.callbacks.iterative import IterativeMagnitudePruning
from sparsetrain.callbacks.polarization import PolarizationGating
from sparsetrain.callbacks.trainer import (
    callbacks_of,
    example_of,
    forget_compiled,
    is_fast_dev_run,
    set_callbacks,
    uncompiled,
)
from sparsetrain.export.architecture import Architecture, Kept, base_shapes, cut_, note_cut
from sparsetrain.export.shrink import exact_copy, kept_places, shrink
from sparsetrain.export.units import Unit, pruned_units, units
from sparsetrain.masks import take
from sparsetrain.patterns import Channel
from sparsetrain.steps import check_steps


class Shrinking(L.Callback):
    """Make the module physically smaller during the fit, once its sparsity method has cut channels off, and train on.

    Listed beside the method in one Trainer:

        callbacks=[GradualMagnitudePruning(schedule, pruning=Pruning(pattern=Channel(axis=1))), Shrinking("0.8run")]

    After the optimizer step `at`, before validation and checkpoints, the units that the method has cut off are removed
    from the module in place. Its parameters stay the same objects with fewer values, so that optimizers, schedulers and
    loggers go on; gradients, optimizer state of a weight's shape, and masks are cut along the same places, where what
    is left may be all True. The loss is the same before and after (dropout draws other values, for it has fewer to
    draw), which is verified on a copy first. Where that fails, or nothing is cut off, the run warns and goes on as it
    is. "sparsity/actual" is that of the smaller network from there on. Verified is `forward`; a layer that only
    `training_step` calls, such as an auxiliary head or a probe, is not seen: if it reads a removed channel, the next
    step fails. Let `forward` call it, or prune no channels that it reads.

    A checkpoint from then on holds the smaller network, which neither the dense module loads nor
    `load_from_checkpoint`. A Trainer with the callbacks of the fit shrinks a module that is built as for the fit before
    it loads such a checkpoint: in `fit(ckpt_path=...)`, which resumes the run exactly, and in `validate`, `test` and
    `predict`. After the fit, `export.save_shrunk(folder, module)`, or the same of a network that the module holds,
    writes files that `export.load_shrunk` reads.

    Methods are `GradualMagnitudePruning` and others with `Pruning(pattern=Channel(axis=1))`, which prunes what reads a
    channel, `FixedMasks`, and `PolarizationGating` by channel; not those of several rounds, which go back to dense
    weights. They run on a single device.

    Args:
        at: the optimizer step after which the module shrinks, at least 1, such as "0.8run"; after the method's last
            update of its masks.
        input_shape: of one example without the batch, such as (3, 32, 32), for a forward pass of zeros; None takes the
            module's `example_input_array`.

    Attributes:
        removed: how many units were removed, 0 if that failed; None before.

    Raises:
        ValueError: a length that is none; at the start of the fit, one beyond the run or before the method's last
            update, no method or one that does not go with it, several devices, averages of weights, checkpoints
            of weights alone, no example, a module that cannot be traced or run in float64, or an optimizer whose state
            cannot be cut; on loading, a checkpoint that belongs to another module.
        ImportError: at the start of the fit, torch-pruning is missing.
    """

    removed: int | None
    _method: SparsityCallback | None
    _architecture: Architecture | None
    _units: tuple[Unit, ...]
    _step: int
    _checked: bool

    def __init__(self, at: int | str, *, input_shape: Sequence[int] | None = None) -> None:
        check_steps(at, "at")
        self.at = at
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self._loading: _ShrinkFirst | None = None
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        left = None if self._architecture is None or self._architecture.is_whole else self._architecture.state()
        return {"removed": self.removed, "architecture": left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.removed = state_dict["removed"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin()
            self._method = _method(trainer)
            if any(getattr(callback, "save_weights_only", False) for callback in callbacks_of(trainer)):
                raise ValueError(
                    "A checkpoint of weights alone (save_weights_only=True) does not say what Shrinking has left of "
                    "the network: nothing could load it. Save whole checkpoints, or use export.save_shrunk at the end."
                )
        self._loading = _ShrinkFirst(pl_module, self._take_over)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Right after the method, which has moved itself towards the end; before the first checkpoint.
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        after = others.index(self._method) + 1 if self._method is not None else 0
        set_callbacks(trainer, [*others[:after], self, *others[after:]])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._method is not None
        self._architecture = Architecture.of(pl_module)
        self._check_at(trainer, self._method)
        if self.removed is None:
            example = example_of(pl_module, self.input_shape, of=self)
            with uncompiled(pl_module):
                exact_copy(pl_module, example)  # which is compared with the smaller one, later
                if not isinstance(self._method, PolarizationGating):
                    self._units = units(pl_module, example)
        self._shrink_if_due(trainer, pl_module)  # in a checkpoint that was written between the step and this callback

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._checked:  # most optimizers have their state from the first step on
            _check_state(trainer.optimizers, pl_module)
            self._checked = True
        self._shrink_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.removed is None and self._method is not None:
            rank_zero_warn(
                f"The run ended at step {self._method.step}, before its network was to shrink (step {self._step}): it "
                "is as large as before."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._detach()

    def _begin(self) -> None:
        """The state before a fit."""
        self.removed = None
        self._method = None
        self._architecture = None
        self._units = ()
        self._step = 0
        self._checked = False

    def _detach(self) -> None:
        self._units = ()
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def _take_over(self, pl_module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Give the module the architecture that a checkpoint has weights for."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        architecture, present = state.get("architecture"), Architecture.of(pl_module)
        saved = None if architecture is None else Architecture.from_state(architecture)
        if saved is not None and present == Architecture(base_shapes(pl_module)):
            shapes = base_shapes(pl_module)
            differing = next((n for n in [*saved.shapes, *shapes] if saved.shapes.get(n) != shapes.get(n)), None)
            if differing is not None:
                raise ValueError(
                    f"The checkpoint given as ckpt_path is of a module that shrank from another one: {differing!r} was "
                    f"{saved.shapes.get(differing, 'missing')} there and is {shapes.get(differing, 'missing')} in this "
                    f"{type(pl_module).__name__}. Build the module as for that fit."
                )
            saved.apply_(pl_module)
        elif present != (saved or Architecture(base_shapes(pl_module))):
            raise ValueError(
                f"This {type(pl_module).__name__} has already shrunk, to other shapes than those of the checkpoint "
                "given as ckpt_path. Give it as it was before anything was removed."
            )
        self._architecture = Architecture.of(pl_module)

    def _check_at(self, trainer: L.Trainer, method: SparsityCallback) -> None:
        total, final = method.total_steps, method.final_step()
        if is_fast_dev_run(trainer):
            self._step = total or 1
            return
        (self._step,) = method.steps(self.at)
        least = 1 if final is None else final + 1
        if self._step < least or (total is not None and self._step > total):
            limit = "" if total is None else f", and at most {total}, as many as the run has"
            raise ValueError(
                f"at={self.at!r} is step {self._step}; it must be at least {least}, when {type(method).__name__} has "
                f"made its last masks{limit}."
            )

    def _shrink_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._method is not None
        if self.removed is not None or self._method.step < self._step:
            return
        with uncompiled(pl_module):
            self.removed = self._shrink(trainer, pl_module, self._method)
        self._units = ()

    def _shrink(self, trainer: L.Trainer, pl_module: L.LightningModule, method: SparsityCallback) -> int:
        """Remove what is cut off, and return how many units these are."""
        found = method.units if isinstance(method, PolarizationGating) else pruned_units(self._units, method.masks)
        before = sum(parameter.numel() for parameter in pl_module.parameters())
        try:
            if not found:
                raise ValueError(f"{type(method).__name__} has cut off no unit. Prune more.")
            small = shrink(pl_module, found, example_of(pl_module, self.input_shape, of=self))
            _check_biases(pl_module, small)
            _check_state(trainer.optimizers, pl_module)
        except (ValueError, RuntimeError) as error:  # the run goes on: its network is right, only not small
            rank_zero_warn(f"The network did not shrink at step {method.step}. {error}")
            return 0
        kept = kept_places(pl_module, found)
        _cut_state_(trainer.optimizers, pl_module, kept)
        _cut_module_(pl_module, small, kept)
        method.follow_cut(kept)
        forget_compiled(pl_module)
        self._architecture = Architecture.of(pl_module)
        after = sum(parameter.numel() for parameter in pl_module.parameters())
        rank_zero_info(f"At step {method.step} {len(found)} units were removed: {before} parameters became {after}.")
        return len(found)


class _ShrinkFirst:
    """Calls `take_over` before a module's weights are loaded from a checkpoint, from construction to `remove`.

    Lightning hands checkpoints to callbacks only afterwards, but to the module's own hook before.
    """

    def __init__(
        self, pl_module: L.LightningModule, take_over: Callable[[L.LightningModule, Mapping[str, Any]], None]
    ) -> None:
        self._pl_module = pl_module
        self._previous = vars(pl_module).get("on_load_checkpoint")
        original = pl_module.on_load_checkpoint

        def load(checkpoint: dict[str, Any]) -> None:
            take_over(pl_module, checkpoint)
            original(checkpoint)

        pl_module.on_load_checkpoint = load  # type: ignore[method-assign]

    def remove(self) -> None:
        if self._previous is None:
            del self._pl_module.on_load_checkpoint
        else:
            self._pl_module.on_load_checkpoint = self._previous  # type: ignore[method-assign]


def _method(trainer: L.Trainer) -> SparsityCallback:
    """The Trainer's sparsity method, if it and the rest of the Trainer let a module shrink."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} does not go with Shrinking: the averages would keep the former shapes. "
                "Remove it."
            )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"Shrinking changes the shapes of parameters, which {type(trainer.strategy).__name__} cannot follow. Use a "
            "single device, or call export.shrink after the fit."
        )
    methods = [callback for callback in callbacks_of(trainer) if isinstance(callback, SparsityCallback)]
    if len(methods) != 1:
        raise ValueError(
            f"Shrinking needs one sparsity method in the Trainer's callbacks, which cuts channels off; there are "
            f"{len(methods)}. Add one, such as GradualMagnitudePruning."
        )
    (method,) = methods
    if isinstance(method, IterativeMagnitudePruning):
        raise ValueError(
            f"{type(method).__name__} goes back to weights of the dense shapes in each round, so its network cannot "
            "shrink during the fit. Call export.shrink after it."
        )
    if isinstance(method, PolarizationGating) and method.granularity == "layer":
        raise ValueError(
            "PolarizationGating(granularity='layer') removes whole blocks with their parameters, which optimizers "
            "would keep. Use granularity='channel', or call export.shrink after the fit."
        )
    if not isinstance(method, FixedMasks | PolarizationGating) and method.pruning.pattern != Channel(axis=1):
        raise ValueError(
            f"{type(method).__name__} with {method.pruning.pattern} cuts no channels off so that their removal changes "
            "nothing. Use GradualMagnitudePruning with Pruning(pattern=Channel(axis=1)), which masks what reads a "
            "channel, FixedMasks, or PolarizationGating."
        )
    return method


def _check_biases(module: nn.Module, small: nn.Module) -> None:
    """Raise if the smaller network has other parameters: an optimizer could not take these over on resume."""
    added = Architecture.of(small).biases[len(Architecture.of(module).biases) :]
    if added:
        raise ValueError(
            f"{added[0]!r} reads a constant of what is written by zeros, and has no bias that could replace it. Prune "
            "with Channel(axis=1), which masks what reads a channel."
        )


def _check_state(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Raise if an optimizer holds other state than single numbers and one number for each weight."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items() if parameter in names else ():
                if isinstance(value, Tensor):
                    fits = value.shape == parameter.shape or value.numel() == 1
                else:
                    fits = value is None or isinstance(value, int | float | str)
                if not fits:
                    raise ValueError(
                        f"{type(optimizer).__name__} holds {key!r} for {names[parameter]!r}, which is not one number "
                        f"for each of its weights {tuple(parameter.shape)} and cannot be cut with them. Use another "
                        "optimizer, such as SGD or AdamW, or call export.shrink after the fit."
                    )


def _cut_state_(optimizers: Iterable[Optimizer], module: nn.Module, kept: Kept) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            dims = kept.get(names.get(parameter, ""), {})
            for key, value in entries.items() if dims else ():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[key] = take(value, dims)


@torch.no_grad()
def _cut_module_(module: nn.Module, small: nn.Module, kept: Kept) -> None:
    """Give `module` the shapes and values of `small`; its parameters stay the same objects."""
    live = dict(module.named_parameters())
    note_cut(module, kept)
    cut_(module, kept)
    for name, parameter in live.items():
        if name in kept:
            gradient, parameter.grad = parameter.grad, None
            path, _, attribute = name.rpartition(".")
            cut = module.get_parameter(name).data
            # Through another type: only this lets autograd forget the former shape while an older graph is alive.
            parameter.data = cut.to(torch.float16 if cut.dtype != torch.float16 else torch.float32)
            parameter.data = cut
            parameter.grad = None if gradient is None else take(gradient, kept[name])
            setattr(module.get_submodule(path), attribute, parameter)
        parameter.copy_(small.get_parameter(name))  # constants may have moved into biases
