"""What N:M methods share: products with N of every M weights, while the optimizer moves all of them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from sparsetrain import ops
from sparsetrain.callbacks.backends import BackendChoice
from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.checkpoints import HeldBackCheckpoints
from sparsetrain.callbacks.decay import ClipThenDecay, check_decay
from sparsetrain.callbacks.masters import MasterFollower, add_pruned_, copies_of, pruned_masters, restore_masters_
from sparsetrain.callbacks.trainer import callbacks_of, has_compiled, is_compiled, is_fast_dev_run, set_callbacks
from sparsetrain.choices import check_choice
from sparsetrain.masks import Masks, Pruning
from sparsetrain.ops import NMRule
from sparsetrain.ops.layers import EffectiveLayer, check_parameter, make_effective
from sparsetrain.ops.policy import Decision, check_backend
from sparsetrain.selection import PlanRow, Selection
from sparsetrain.steps import check_steps

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_COMPUTE = _MIXED | {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class NMTraining(SparsityCallback):
    """What N:M methods share: layers that compute with effective weights, over a dense master that is trained.

    The module's layers are converted at `setup` and folded at the end of the fit: then their weights are N:M sparse,
    and nothing is left of the conversion. Meanwhile their Parameters hold the dense master, which optimizers, weight
    decay and averaging see; each `state_dict` of the module, and so each checkpoint, holds the sparse weights that its
    forward pass uses, under the plain names. What is missing there is in this callback's state, so that a resumed run
    has the same master, bit for bit. The layers' masks are functions of the master, made again after each optimizer
    step; `masks` are those of the last save or of the end of the fit, and `read_masks()` brings them up to date.

    With `sparse_until` the run ends with a dense tail: the layers become plain ones that compute with the master, as
    validation and checkpoints then do, and the decay ends. `final` says what is left after the fit: the master, or its
    N:M weights, which no validation within the fit has seen. A monitored checkpoint keeps networks of the kind that is
    left: those of the tail, or those before it.

    Effective weights are made once for an optimizer step, at the start of the next batch. Whatever writes weights
    before that, in hooks of the module or other callbacks, is seen; later, within the batch or between accumulated
    ones, writing in place is, but through `.data` or in compiled code it is not. Writing into the tensors of a
    `state_dict` is not, either: those of these layers are copies, so averages have to go through `parameters()`. A use
    of a weight beside its layer's own call, as that of a tied decoder, has the dense master until the end of the fit.

    Args:
        rule: the effective weights of a layer.
        decay: SR-STE's: added to the gradient as decay * (1 - mask) * weight, once per optimizer step, after unscaling
            and clipping.
        refresh: steps for which a mask is kept.
        sparse_until: the optimizer step from which the layers are dense, such as "0.8run"; None: they never are.
        final: "sparse" or "dense" (with `sparse_until` only).
        backend: "reference" (dense products of masked weights), "cusparselt" (2:4 kernels wherever they exist) or
            "auto" (2:4 kernels where a measurement after the first step finds them faster). A resumed run measures
            again: on a device with such kernels, resume under "auto" is exact up to their rounding.
        algorithms: a file; with it each layer on 2:4 kernels runs with the fastest of cuSPARSELt's algorithms that are
            correct, which are searched after the first step (some seconds a shape) and kept there for later runs.
        where: the parameters; what cannot hold the pattern stays dense, and the plan says why.
    """

    regrow = True

    _rows: tuple[PlanRow, ...]
    _layers: dict[str, EffectiveLayer]
    _holders: list[tuple[str, EffectiveLayer]]
    _shadow: Mapping[str, Any]
    _loaded: Mapping[str, Any]
    _optimizers: MasterFollower | None
    _replaced: list[tuple[L.LightningModule, str, Any]]
    _every: int
    _until: int | None
    _dtype: torch.dtype | None
    _dense: tuple[nn.Module, ...]
    _choice: BackendChoice | None
    _decided: tuple[Decision, ...]  # before it was resumed
    _first_step: int | None  # before the first step of this fit; None after it

    def __init__(
        self,
        rule: NMRule,
        *,
        decay: float,
        refresh: int | str,
        sparse_until: int | str | None,
        final: Literal["sparse", "dense"],
        backend: Literal["auto", "reference", "cusparselt"],
        algorithms: Path | str | None,
        where: Selection,
    ) -> None:
        if not decay >= 0:
            raise ValueError(f"decay is {decay}; it must be at least 0.")
        check_steps(refresh, "refresh")
        if sparse_until is not None:
            check_steps(sparse_until, "sparse_until")
        check_choice(final, "final", ("sparse", "dense"))
        if final == "dense" and sparse_until is None:
            raise ValueError(
                "final='dense' would leave weights that no product of the run has used. Give sparse_until='0.8run', or "
                "another step from which the layers are trained dense."
            )
        check_backend(backend)
        self.rule, self.decay, self.refresh, self.where = rule, decay, refresh, where
        self.sparse_until, self.final, self.backend, self.algorithms = sparse_until, final, backend, algorithms
        super().__init__(Pruning(where), check="off")

    def target(self, step: int) -> float | None:
        return None  # masks follow from the weights

    def final_step(self) -> int | None:
        if self._until is None:
            return 0
        return self._until - 1 if self.final == "dense" else self.run.total_steps

    @property
    def at_target(self) -> bool:
        """Whether the layers compute with weights of the kind that the fit leaves, N:M or dense."""
        return (self.final == "sparse") != bool(self._dense)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The backend of each layer and why, with what was measured; empty until it is decided."""
        return self._decided if self._choice is None else self._choice.decisions

    @property
    def plan(self) -> tuple[PlanRow, ...]:
        """One row per parameter: whether its layer computes with N:M weights, or why not."""
        return self._rows

    def prepare(self, trainer: L.Trainer) -> None:
        (self._every,) = self.steps(self.refresh)
        if self._every < 1:
            raise ValueError(f"refresh={self.refresh!r} is less than one step.")
        if self.sparse_until is None:
            return
        (self._until,) = self.steps(self.sparse_until)
        total = self.run.total_steps
        if is_fast_dev_run(trainer):
            self._until = total
        elif self._until < 1 or (total is not None and self._until >= total):
            limit = "" if total is None else f", and at most {total - 1} in a run of {total} steps"
            raise ValueError(
                f"sparse_until={self.sparse_until!r} is step {self._until}; it must be at least 1{limit}. Leave it out "
                "for a run without a dense tail."
            )

    def facts(self) -> dict[str, float]:
        on_kernels = [layer for layer in self._layers.values() if layer.backend == "cusparselt"]
        return {**super().facts(), "sparsity/layers_on_kernels": float(len(on_kernels))}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks = callbacks_of(trainer)
        earlier = list(takewhile(lambda callback: callback is not self, callbacks))
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for callback in callbacks:
            if isinstance(callback, NMTraining) and callback is not self:
                raise ValueError(
                    f"{type(self).__name__} and {type(callback).__name__} would both convert layers of this module, "
                    "which goes with one N:M callback. Remove one of them."
                )
        for callback in earlier:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} has copied the module before {type(self).__name__} could convert its "
                    f"layers. List it after {type(self).__name__}."
                )
        if self.backend == "cusparselt":
            weight = next(pl_module.parameters(), None)  # None: not made yet
            dtype = _COMPUTE.get(str(trainer.precision), torch.bfloat16 if weight is None else weight.dtype)
            check_backend(self.backend, dtype, trainer.strategy.root_device)
        if not any(isinstance(callback, _UndoAtLast) for callback in callbacks):
            set_callbacks(trainer, [*callbacks_of(trainer), _UndoAtLast()])
        if is_overridden("configure_model", pl_module):
            original = pl_module.configure_model

            def configure_model() -> None:
                original()
                if next(ops.effective_layers(pl_module), None) is None:  # averaging calls it before the Trainer does
                    self._convert(pl_module)

            self._replace(pl_module, "configure_model", configure_model)
        else:
            self._convert(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Without the masters, which would be kept as long as the rest.
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "shadow"})
        self._loaded = state_dict.get("shadow", {})
        self._decided = tuple(map(Decision.from_state, state_dict["decisions"]))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for _, layer in ops.effective_layers(pl_module):
            layer.called = False

    def take_hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, layer in ops.effective_layers(pl_module):
            check_parameter(name, layer)
        self._bind(pl_module)
        self._warn_of_late_layers(pl_module)
        self._check_owner(trainer)
        on_step = partial(self._after_counted_step, trainer, pl_module)
        self._optimizers = MasterFollower(self.masks, trainer.optimizers, on_move=self.apply, on_step=on_step)
        self._warn_of_untrained(self._optimizers.followed)
        self._check_decay(trainer, pl_module)
        if self.decay:
            clip = ClipThenDecay(pl_module.configure_gradient_clipping, self._add_decay)
            self._replace(pl_module, "configure_gradient_clipping", clip)
        copies = copies_of(trainer, pl_module)
        if self._restored is not None:
            self._restore(self._restored)
        restore_masters_(self._loaded, copies)
        self._loaded, self._first_step = {}, self.step
        if self._until is not None and self.step >= self._until:
            self._make_dense(trainer, pl_module)
            return
        if not self.masks.sparse_names():
            self.read_masks()  # restored from the dense tail of a shorter run
        if self._every > 1:
            # The masks of the live master are also those of its averages, which take its place at validation.
            layers = [[layer for _, layer in ops.effective_layers(module)] for module in copies.values()]
            whole = [held for held in layers if len(held) == len(self._layers)]
            self._holders = [pair for held in whole for pair in zip(self._layers, held, strict=True)]
            self._hold()
        self._dtype = _MIXED.get(str(trainer.precision))
        dtype = self._dtype or next(iter(self._layers.values())).weight.dtype
        self._choice = BackendChoice(trainer, pl_module, self.backend, dtype, self.algorithms)
        self.apply()

    def apply(self) -> None:
        """Let no product use what was made of the weights before: until `make_weights`, each makes them anew."""
        for layer in self._layers.values():
            layer.forget()

    def make_weights(self) -> None:
        """Make the effective weights of the present master, where they are not made.

        Layers that no optimizer holds, such as those of a momentum encoder, may be written at any moment without a
        notice: their products make them each time.

        Raises:
            ValueError: a weight that was parametrized, or has another shape, since training started.
        """
        trained = set() if self._optimizers is None else self._optimizers.followed
        for name, layer in self._layers.items():
            check_parameter(name.removesuffix(".weight"), layer)
            if layer.weight.shape != self.masks[name].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(layer.weight.shape)}, and had {tuple(self.masks[name].shape)} when "
                    "training started. Let layers grow before the fit, or add it to `exclude`."
                )
            if name in trained and layer.weight.requires_grad and layer.stale:
                layer.refresh_(self._dtype)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        self.make_weights()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        self.make_weights()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply()  # weight averaging puts the master back

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # Gradients are left alone: they are dense.
        assert self._optimizers is not None
        if self._optimizers.before_step(optimizer, trainer.optimizers):
            self._check_decay(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first_step is not None and self.step > self._first_step:
            self._first_step = None
            self._look_back(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            masters = pruned_masters(trainer, pl_module)
            state["shadow"] = masters if masters[""] else self._shadow

    def state_dict(self) -> dict[str, Any]:
        self.read_masks()
        return super().state_dict() | {"decisions": [asdict(decision) for decision in self.decisions]}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.final == "sparse":
            make_effective(self._dense, self.rule)
            self._dense = ()
        elif self._layers:
            rank_zero_warn(
                f"The run ended at step {self.step}, before its dense tail (step {self._until}): its weights are N:M."
            )
        self._shadow = pruned_masters(trainer, pl_module)  # for those that save after this
        if folded := ops.fold(pl_module):
            self.masks.replace(folded, "The final masks")
        self._layers = {}
        self._detach()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if next(ops.effective_layers(pl_module), None) is None:
            return
        self._bind(pl_module)  # resumed from the end of the run: nothing was left to train
        if self._restored is not None:
            self._restore(self._restored)
            self._shadow = self._loaded
            if not self.masks.sparse_names():  # saved in the dense tail
                self._make_dense(trainer, pl_module)
                self.on_train_end(trainer, pl_module)
        self.undo(pl_module)
        self._detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's tuner ends a fit by this alone, having loaded what it saved before the first step.
        if next(ops.effective_layers(pl_module), None) is not None:
            add_pruned_(pl_module, self._loaded.get("", {}))
            self.undo(pl_module)
        super().teardown(trainer, pl_module, stage)

    def undo(self, pl_module: L.LightningModule) -> None:
        """Make the layers the plain ones that they were; the master stays."""
        self._layers = {}
        ops.unconvert(pl_module)

    def _begin(self) -> None:
        super()._begin()
        self._rows, self._layers, self._holders, self._dense = (), {}, [], ()
        self._optimizers, self._replaced, self._choice = None, [], None
        self._every, self._until, self._dtype, self._first_step = 1, None, None, None
        self._shadow, self._loaded, self._decided = {}, {}, ()

    def _bind(self, pl_module: L.LightningModule) -> None:
        self._layers = {f"{name}.weight": layer for name, layer in ops.effective_layers(pl_module)}
        self.masks = Masks(Pruning(Selection(include=tuple(self._layers))))
        self.masks.bind(pl_module)
        self.read_masks()

    def read_masks(self) -> None:
        """Let `masks` be those of the present weights, or those that are kept for some steps."""
        if self._layers:
            self.masks.replace({name: layer.mask for name, layer in self._layers.items()}, "The present masks")

    def _hold(self) -> None:
        """Keep the masks as they are read now, until they are read again."""
        for name, layer in self._holders:
            layer.hold_(self.masks[name])

    def _make_dense(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the dense tail: make plain layers of the module's, and of those of its averages."""
        if self._choice is not None:
            self._choice.detach()
        modules = copies_of(trainer, pl_module).values()
        self._dense = tuple(layer for module in modules for layer in ops.unconvert(module))
        self._layers, self._holders = {}, []
        whole = {name: torch.ones_like(mask) for name, mask in self.masks.items()}
        self.masks.replace(whole, "The masks of the dense tail")

    def _convert(self, pl_module: L.LightningModule) -> None:
        self._rows = ops.convert(pl_module, self.rule, where=self.where)

    def _warn_of_late_layers(self, pl_module: L.LightningModule) -> None:
        """Warn of weights that came after the conversion, and put them into the plan."""
        planned = {row.name for row in self._rows}
        late = [row for row in self.where.plan(pl_module) if row.name not in planned]
        if names := [row.name for row in late if row.pruned]:
            rank_zero_warn(
                f"The layers of {', '.join(names)} were made after {type(self).__name__} had converted the others, as "
                "in the module's `setup`, and are trained dense. Make them in __init__ or configure_model, or add them "
                "to `exclude`."
            )
        dense = [replace(row, pruned=False, reason="made after the conversion") if row.pruned else row for row in late]
        self._rows += tuple(dense)

    def _after_counted_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count_step()
        if self.step == self._until:
            self._begin_tail(trainer, pl_module)
        elif self._every > 1 and self.step % self._every == 0:
            for _, layer in self._holders:
                layer.hold_(None)
            self.read_masks()
            self._hold()

    def _look_back(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do what waited for a batch with an optimizer step."""
        if self._choice is not None:
            self._choice.after_step(trainer, pl_module)
        # Compiled layers do not tell whether they are called, and a compiled function may call any.
        if not self._layers or is_compiled(pl_module) or has_compiled():
            return
        mine = torch.tensor([float(layer.called) for layer in self._layers.values()], device=pl_module.device)
        called = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        for (name, layer), ranks in zip(self._layers.items(), called, strict=True):
            if not ranks and layer.weight.grad is not None:
                rank_zero_warn(
                    f"{name!r} has a gradient, but its layer was not called in the first step. If the module "
                    "multiplies the weight by itself, it is trained dense, and N:M in checkpoints only: then add it to "
                    "`exclude` of `where`."
                )

    def _begin_tail(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._make_dense(trainer, pl_module)
        rank_zero_info(f"From step {self.step} on the N:M layers are dense.")
        if self.final == "sparse":
            self._held_back = HeldBackCheckpoints(callbacks_of(trainer))
            if self._held_back:
                rank_zero_info("Monitored checkpoints keep what was before: the fit will leave N:M weights.")

    def _add_decay(self, optimizer: Optimizer) -> None:
        """Add decay * (1 - mask) * weight to the gradients that `optimizer` will use."""
        assert self._optimizers is not None
        held = self._optimizers.held(optimizer)
        for name, layer in self._layers.items():
            if name in held and layer.weight.grad is not None:
                layer.add_decay_(self.decay)

    def _check_decay(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._optimizers is not None
        for optimizer in self._optimizers.names if self.decay else ():
            check_decay(self.decay, trainer, pl_module, optimizer)

    def _replace(self, pl_module: L.LightningModule, name: str, value: Callable[..., Any]) -> None:
        """Set an attribute of the module until `_detach`."""
        self._replaced.append((pl_module, name, vars(pl_module).get(name)))
        setattr(pl_module, name, value)

    def _detach(self) -> None:
        super()._detach()
        if self._choice is not None:
            self._choice.detach()
        if self._optimizers is not None:
            self._optimizers.detach()
            self._optimizers = None
        self._holders = []
        for module, name, before in reversed(self._replaced):
            delattr(module, name) if before is None else setattr(module, name, before)
        self._replaced = []


class _UndoAtLast(L.Callback):
    """Undoes the conversion after an exception, when the callbacks that save have done so; the master stays."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for callback in callbacks_of(trainer):
            if isinstance(callback, NMTraining):
                callback.undo(pl_module)
        self._leave(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        set_callbacks(trainer, [callback for callback in callbacks_of(trainer) if callback is not self])
