"""What every sparsity method shares: masks that stay exact through steps, checkpoints, averaging and resume."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.probe import Probe, is_elementwise, probe_optimizer
from sparsetrain.masks import Masks, Pruning, Update
from sparsetrain.report import plan_table
from sparsetrain.selection import PlanRow
from sparsetrain.steps import RunLength, parse_steps

_READ_EVERY = 50  # steps after which the verdicts of the cheap check are fetched from an accelerator


class SparsityCallback(L.Callback, ABC):
    """A sparsity method: a subclass says by `target` when the masks change and to which sparsity; the rest is here.

    Masks are multiplied into the weights in place, so the module, its `state_dict` and its checkpoints stay those of
    the plain dense model. Gradients of pruned weights are zeroed before each step, which keeps weights at zero under
    all but a few optimizers; under those (a probe finds out) the weights are masked after each step, too.

    Steps are real optimizer steps: one that a gradient scaler skips does not count. With several optimizers those of
    the first one that holds a pruned weight are counted, also under manual optimization; "ep" then takes it that this
    optimizer steps once per batch.

    Args:
        pruning: what is pruned, scored and allocated how.
        check: whether to look for revived weights after each step: "off", "cheap" (one tensor a step, in turn) or
            "full" (every tensor).

    Attributes:
        masks: parameter name -> bool tensor, True = kept.
        history: one entry per mask update, over resumes.
        step: optimizer steps made.
        run: the run's length, once training has started.
    """

    regrow: ClassVar[bool] = False

    masks: Masks
    history: list[Update]
    step: int
    run: RunLength
    _restored: Mapping[str, Any] | None
    _final_step: int | None
    _updated_at: int
    _logged: dict[str, float]

    def __init__(self, pruning: Pruning = Pruning(), *, check: str = "cheap") -> None:
        if check not in ("off", "cheap", "full"):
            raise ValueError(f"check={check!r} is unknown. Choose 'off', 'cheap' or 'full'.")
        self.pruning = pruning
        self.check = check
        self._begin()

    @abstractmethod
    def target(self, step: int) -> float | None:
        """The sparsity to prune to just before optimizer step `step`; None leaves the masks alone."""

    def prepare(self, trainer: L.Trainer) -> None:
        """Resolve lengths against `self.run`; called once, before the first `target`.

        Raises:
            ValueError: settings that do not fit this run.
        """

    def initialize(self) -> None:
        """Set the masks with which a run begins that is not resumed; without this all weights are kept."""

    def final_step(self) -> int | None:
        """The optimizer step whose update reaches the sparsity that stays to the end; None in a run without an end."""
        if self.run.total_steps is None:
            return None
        updates = [(s, t) for s in range(self.run.total_steps) if (t := self.target(s)) is not None]
        earlier = [s for s, t in updates if t != updates[-1][1]]
        return next((s for s, _ in updates if not earlier or s > earlier[-1]), 0)

    def steps(self, *lengths: int | str) -> tuple[int, ...]:
        """Each length, such as "5ep", in whole steps of this run."""
        return tuple(parse_steps(length, self.run) for length in lengths)

    @property
    def plan(self) -> tuple[PlanRow, ...]:
        """One row per parameter: pruned, or why not."""
        return self.masks.plan

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run; None if it has no fixed end."""
        return self.run.total_steps

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({self.pruning.where!r})"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._begin()
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"{type(self).__name__} cannot mask weights that {type(trainer.strategy).__name__} shards. "
                "Use strategy='ddp' or a single device."
            )
        # After every callback that writes weights (averaging), before the first that saves them.
        others = [callback for callback in _callbacks(trainer) if callback is not self]
        position = next((i for i, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
        setattr(trainer, "callbacks", [*others[:position], self, *others[position:]])  # noqa: B010  Lightning iterates the old list

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this also when the checkpoint holds nothing of this callback.
        if trainer.state.fn != TrainerFn.FITTING or self.state_key in checkpoint.get("callbacks", {}):
            return
        held = sorted(checkpoint.get("callbacks", {}))
        raise ValueError(
            f"The checkpoint given as ckpt_path holds no state of {self.state_key} (it has {held}): it would be "
            "resumed without its masks. Resume a run with the callback it was trained with. To begin a sparse run from "
            "these weights, call module.load_state_dict(torch.load(path)['state_dict']) and fit without ckpt_path."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # used at train start: weights and devices are not settled before

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run = _run_length(trainer)
        self.prepare(trainer)
        self.masks.bind(pl_module)
        self._check_owner(trainer)
        if self._restored is None:
            self.initialize()
        else:
            self._restore(self._restored)
        self._attach(trainer, pl_module)
        self.masks.apply_()
        self._final_step = self.final_step()
        for callback in _callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k != 0:
                self._held_back[callback] = callback.save_top_k
        if self._held_back and not self.at_target:
            for callback in self._held_back:
                callback.save_top_k = 0  # the last one is still saved, so that the run can be resumed
            rank_zero_info(
                f"Monitored checkpoints are kept once the final sparsity is reached (step {self._final_step})."
            )
        rank_zero_info(f"{type(self).__name__}:\n{plan_table(self.plan)}")

    @property
    def at_target(self) -> bool:
        """Whether the update to the final sparsity has been made."""
        return self._final_step is not None and self.step > self._final_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.masks.apply_()  # weight averaging may have written its averages

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.masks.apply_()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        names = self._owned(optimizer)
        if optimizer is self._counted and self._updated_at != self.step:  # a closure may be evaluated many times
            target = self.target(self.step)
            if target is not None and self._gradients_are_finite(trainer):
                self._update(trainer, target)
                self._updated_at = self.step
        for name in names if self.masks.stats.names else []:
            parameter = self.masks.parameter(name)
            if parameter.grad is not None:
                self.masks.stats.observe_step(name, parameter, parameter.grad)
        sparse = set(self.masks.sparse_names())
        self.masks.zero_grads_([name for name in names if name in sparse])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.at_target:
            self._release_checkpoints()
        facts = {
            "sparsity/target": self.history[-1].target if self.history else self.masks.sparsity(),
            "sparsity/at_target": float(self.at_target),
        }
        actual = {"sparsity/actual": self.masks.sparsity()}
        # Lightning repeats what was logged till the epoch ends; a call of `log` costs more than masking a small model.
        logged = {"epoch": trainer.current_epoch, **facts, **actual}
        if logged != self._logged:
            self._logged = logged
            pl_module.log_dict(actual, prog_bar=True)
            pl_module.log_dict(facts)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # "current_model_state": where Lightning's weight averaging puts the live weights.
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                self.masks.apply_to(checkpoint[key])

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.masks.state_dict(),
            "step": self.step,
            "history": [vars(update) for update in self.history],
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read_verdicts()
        self.masks.apply_()
        self._detach()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.masks and self._restored is not None:  # resumed from the end of the run: nothing was left to train
            self.masks.bind(pl_module)
            self._restore(self._restored)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._detach()  # nothing else: another callback may save the run after this

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._detach()

    def _begin(self) -> None:
        """The state before a fit, so that a second one begins clean."""
        self.masks = Masks(self.pruning)
        self.history = []
        self.step = 0
        self.run = RunLength(None, None)
        self._restored = None
        self._counted: Optimizer | None = None
        self._updated_at = -1
        self._final_step = None
        self._names: dict[Optimizer, list[str]] = {}
        self._probes: dict[str, Probe] = {}
        self._handles: list[RemovableHandle] = []
        self._held_back: dict[ModelCheckpoint, int] = {}
        self._verdicts: list[tuple[int, str, Tensor]] = []
        self._checked = 0
        self._logged = {}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.masks.load_state_dict(state)
        self.step = state["step"]
        self.history = [Update(**entry) for entry in state["history"]]

    def _check_owner(self, trainer: L.Trainer) -> None:
        for other in _callbacks(trainer):
            if isinstance(other, SparsityCallback) and other is not self:
                shared = sorted(self.masks.keys() & other.masks.keys())
                if shared:
                    raise ValueError(
                        f"{shared[0]!r} is pruned by two callbacks, {type(other).__name__} and {type(self).__name__}. "
                        "Give them selections without a common parameter."
                    )

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the optimizers of the pruned weights, what they do to zeros, and follow their steps."""
        for optimizer in trainer.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            names = [name for name in self.masks if id(self.masks.parameter(name)) in held]
            if names:
                self._names[optimizer] = names
        if not self._names:
            raise ValueError("No optimizer holds any of the pruned weights. Return one from configure_optimizers.")
        self._counted = next(iter(self._names))
        if len(trainer.optimizers) > 1 or not pl_module.automatic_optimization:
            index = trainer.optimizers.index(self._counted)
            rank_zero_info(f"Steps are those of optimizer {index} ({type(self._counted).__name__}).")
        for optimizer, names in self._names.items():
            found: dict[tuple[int, int], Probe] = {}
            groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            for name in names:
                parameter = self.masks.parameter(name)
                kind = (groups[id(parameter)], parameter.dim())
                if kind not in found:
                    found[kind] = probe_optimizer(optimizer, parameter)
                self._probes[name] = found[kind]
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _owned(self, optimizer: Optimizer) -> list[str]:
        return self._names.get(optimizer, [])

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._release_checkpoints()

    def _release_checkpoints(self) -> None:
        for callback, save_top_k in self._held_back.items():
            callback.save_top_k = save_top_k
        self._held_back.clear()

    def _update(self, trainer: L.Trainer, target: float) -> None:
        self._refresh_state()
        self.history.append(self.masks.update(target, regrow=self.regrow, step=self.step))
        self._refresh_state()
        self.masks.apply_()
        if trainer.world_size > 1:
            mine = torch.tensor(self.masks.checksum(), device=trainer.strategy.root_device)
            everybody = trainer.strategy.all_gather(mine).flatten().tolist()
            if len(set(everybody)) > 1:
                raise RuntimeError(
                    f"The ranks made different masks at step {self.step} (checksums {everybody}): their weights or "
                    "gradients differ. Do not change weights on one rank alone."
                )

    @torch.no_grad()
    def _refresh_state(self) -> None:
        """Give optimizer state at pruned places what a fresh optimizer has there, so that nothing moves them later."""
        sparse = set(self.masks.sparse_names())
        for optimizer, names in self._names.items():
            for name in names:
                parameter = self.masks.parameter(name)
                if name in sparse and parameter in optimizer.state:
                    pruned = ~self.masks.on(name, parameter)
                    for key, value in optimizer.state[parameter].items():
                        if is_elementwise(value, parameter):
                            value.masked_fill_(pruned, self._probes[name].fresh.get(key, 0.0))

    def _gradients_are_finite(self, trainer: L.Trainer) -> bool:
        """False where a gradient scaler is about to skip this step: the update is then made at its repetition."""
        grads = {name: g for name in self.masks if (g := self.masks.parameter(name).grad) is not None}
        norms = torch._foreach_norm(list(grads.values()), math.inf) if grads else []
        broken = [name for name, norm in zip(grads, norms, strict=True) if not math.isfinite(float(norm))]
        if not broken:
            return True
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return False
        raise RuntimeError(
            f"The gradient of {broken[0]!r} is not finite at step {self.step}, where the masks are to be updated: the "
            "step would destroy the weights. Lower the learning rate, clip gradients, or mend the data."
        )

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        sparse = set(self.masks.sparse_names())
        names = [name for name in self._owned(optimizer) if name in sparse]
        self.masks.multiply_([name for name in names if not self._probes[name].preserves_zero])
        if names and self.check != "off":
            self._checked += 1
            for name in names if self.check == "full" else [names[self._checked % len(names)]]:
                self._verdicts.append((self.step, name, self.masks.revived(name)))
            if self.masks.parameter(names[0]).device.type == "cpu" or len(self._verdicts) >= _READ_EVERY:
                self._read_verdicts()
        if optimizer is self._counted:
            self.step += 1

    def _read_verdicts(self) -> None:
        verdicts, self._verdicts = self._verdicts, []
        for step, name, revived in verdicts:
            if bool(revived):
                raise RuntimeError(
                    f"A pruned weight of {name!r} was not zero after step {step}. Something wrote to it after its "
                    "gradient was masked: another callback, a hook of the optimizer, or a gradient that is not finite. "
                    "Let that skip pruned weights, or list its callback before this one."
                )


def _run_length(trainer: L.Trainer) -> RunLength:
    """Optimizer steps in an epoch and in the run, of an optimizer that steps once per (accumulated) batch."""
    batches = trainer.num_training_batches
    varying = any(
        isinstance(callback, GradientAccumulationScheduler) and callback.scheduling.keys() != {0}
        for callback in _callbacks(trainer)
    )
    known = math.isfinite(batches) and not varying
    steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if known else None
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if steps_per_epoch is not None and trainer.max_epochs is not None and trainer.max_epochs != -1:
        limits.append(trainer.max_epochs * steps_per_epoch)
    return RunLength(steps_per_epoch, min(limits, default=None))


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """Lightning sets this attribute where type checkers do not see it."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
