"""What every sparsity method shares: masks that stay exact through steps, checkpoints, averaging and resume."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.callbacks.checkpoints import HeldBackCheckpoints
from sparsetrain.callbacks.trainer import (
    callbacks_of,
    gradient_scale,
    has_scaler,
    is_fast_dev_run,
    refuse_sharding,
    run_length,
    set_callbacks,
)
from sparsetrain.callbacks.zeros import ZeroFollower
from sparsetrain.choices import check_choice
from sparsetrain.masks import Masks, Pruning, Update
from sparsetrain.report import plan_table
from sparsetrain.selection import PlanRow
from sparsetrain.steps import RunLength, parse_steps

_FAR = 0.05  # from the sparsity that is asked for: more than rounding to a pattern's counts, but in small layers


class SparsityCallback(L.Callback, ABC):
    """A sparsity method: a subclass says by `target` when the masks change and to which sparsity; the rest is here.

    Masks are multiplied into the weights in place, so the module, its `state_dict` and its checkpoints stay those of
    the plain dense model. Gradients of pruned weights are zeroed before each step, which keeps weights at zero under
    all but a few optimizers; under those (a probe finds out) the weights are masked after each step, too.

    Steps are real optimizer steps: one that a gradient scaler skips does not count. With several optimizers those of
    the first one that holds a pruned weight are counted, also under manual optimization; "ep" then takes it that this
    optimizer steps once per batch. Parameters that come into an optimizer during training are followed from their first
    step on, and an optimizer that takes the place of the one that is counted is counted on.

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
    _before: tuple[int, int]  # epochs and steps that the Trainer had made before this run, in former fits
    _final_step: int | None
    _updated_at: int
    _follower: ZeroFollower | None
    _held_back: HeldBackCheckpoints | None
    _logged: dict[str, float]

    def __init__(self, pruning: Pruning = Pruning(), *, check: str = "cheap") -> None:
        check_choice(check, "check", ("off", "cheap", "full"))
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
        refuse_sharding(trainer, self, "mask")
        # After every callback that writes weights (averaging), before the first that saves them.
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        position = next((i for i, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
        set_callbacks(trainer, [*others[:position], self, *others[position:]])

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
        # Without shapes it was saved before training, as tuners do, and holds nothing.
        if state_dict["shapes"]:
            self._restored = state_dict  # used at train start: weights and devices are not settled before

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored is None:
            self._before = trainer.current_epoch, trainer.global_step
        else:
            epochs, steps = self._restored["before"]
            self._before = epochs, steps
        self.run = run_length(trainer, epochs_before=self._before[0], steps_before=self._before[1])
        self.prepare(trainer)
        self.take_hold(trainer, pl_module)
        self._final_step = self.final_step()
        final = None if self._final_step is None else self.target(self._final_step)
        if final is not None:
            self._check_sparsity(final)
        if self._final_step is not None and not self.at_target:
            self._held_back = HeldBackCheckpoints(callbacks_of(trainer))
            if self._held_back:
                rank_zero_info(
                    f"Monitored checkpoints are kept once the final sparsity is reached (step {self._final_step}); "
                    "with save_last, the last one is saved all the while."
                )
        rank_zero_info(f"{type(self).__name__}:\n{plan_table(self.plan)}")

    def take_hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bind the masks, as they were or new, and follow the optimizers that hold what they prune."""
        self.masks.bind(pl_module)
        self._check_owner(trainer)
        if self._restored is None:
            self.initialize()
        else:
            self._restore(self._restored)
        self._follower = ZeroFollower(
            self.masks,
            trainer.optimizers,
            check=self.check,
            first_step=self.step,
            on_step=self._count_step,
            gradients_change=_writes_gradients(pl_module),
        )
        self._warn_of_untrained(self._follower.followed)
        if len(trainer.optimizers) > 1 or not pl_module.automatic_optimization:
            counted = self._follower.counted
            rank_zero_info(
                f"Steps are those of optimizer {trainer.optimizers.index(counted)} ({type(counted).__name__})."
            )
        self.apply()

    def _warn_of_untrained(self, followed: set[str]) -> None:
        """Tell of parameters with a mask that are not among those `followed` in optimizers."""
        if untrained := [name for name in self.masks if name not in followed]:
            rank_zero_warn(
                f"{untrained[0]!r} ({len(untrained)} of {len(self.masks)} parameters with a mask) is in no optimizer "
                "now and is pruned all the same. If it is a teacher's or a metric's, add it to `exclude` of `where`."
            )

    def _check_sparsity(self, final: float) -> None:
        """Refuse a final sparsity that cannot be reached, and tell of one that the pattern turns into another."""
        self.masks.check(final)
        reached = self.masks.reachable(final)
        if abs(reached - final) > _FAR:
            rank_zero_warn(
                f"{self.pruning.pattern} turns the sparsity {final} that is asked for into about {reached:.4f}: only "
                "some counts can be expressed. Ask for that sparsity, or take another pattern."
            )

    def read_masks(self) -> None:
        """Bring `masks` up to date, where they follow from the weights; elsewhere they are."""

    def apply(self) -> None:
        """Zero the pruned weights again; called where something else may have written weights."""
        self.masks.apply_()

    @property
    def at_target(self) -> bool:
        """Whether the update to the final sparsity has been made."""
        return self._final_step is not None and self.step > self._final_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply()  # weight averaging may have written its averages

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # afterwards any weights may be validated
            self.apply()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert self._follower is not None
        if self._follower.before_step(optimizer, trainer.optimizers):
            self.hold_zeros()
        held = self._follower.held(optimizer)
        due = optimizer is self._follower.counted and self._updated_at != self.step  # a closure may be called often
        target = self.target(self.step) if due else None
        if target is not None:
            broken = self._not_finite(self.masks)
            if broken is None:
                self._update(trainer, target)
                self._updated_at = self.step
            elif not has_scaler(trainer):
                raise RuntimeError(
                    f"The gradient of {broken!r} is not finite at step {self.step}, where the masks are to be updated: "
                    "the step would destroy the weights. Lower the learning rate, clip gradients, or mend the data."
                )
        # A step with such gradients is skipped by a gradient scaler, and its update is then made at the repetition.
        if self.masks.stats.names and not (has_scaler(trainer) and self._not_finite(held)):
            scale = gradient_scale(trainer, optimizer)
            for name in held:
                parameter = self.masks.parameter(name)
                if parameter.grad is not None:
                    gradient = parameter.grad if scale == 1 else parameter.grad / scale
                    self.masks.stats.observe_step(name, parameter, gradient)
        self.masks.zero_grads_(self._follower.pruned(optimizer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.at_target and self._held_back is not None:
            self._held_back.release()
        facts = self.facts()
        actual = {"sparsity/actual": self.masks.sparsity()}
        # Lightning repeats what was logged till the epoch ends; a call of `log` costs more than masking a small model.
        logged = {"epoch": trainer.current_epoch, **facts, **actual}
        if logged != self._logged:
            self._logged = logged
            pl_module.log_dict(actual, prog_bar=True, batch_size=1)
            pl_module.log_dict(facts, batch_size=1)  # a step that reads its batches by itself has none

    def facts(self) -> dict[str, float]:
        """What is logged beside the sparsity, whenever it changes."""
        return {
            "sparsity/target": self.history[-1].target if self.history else self.masks.sparsity(),
            "sparsity/at_target": float(self.at_target),
        }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # the module may hold any weights
        # "current_model_state": where Lightning's weight averaging puts the live weights.
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                self.masks.apply_to(checkpoint[key])

    def follow_cut(self, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """Go on with a module whose tensors were cut to the places `kept`; see `Masks.cut`."""
        self.masks.cut(kept)

    def hold_zeros(self) -> None:
        """Zero the pruned weights, and their optimizer state, after something else has written there."""
        if self._follower is not None:
            self._follower.refresh_state()
        self.apply()

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.masks.state_dict(),
            "step": self.step,
            "before": list(self._before),
            "history": [vars(update) for update in self.history],
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._follower is not None:
            self._follower.read_verdicts()
        self.apply()
        self._detach()
        final = self._final_step
        target = None if final is None or self.at_target else self.target(final)
        if target is not None and (not self.history or self.history[-1].target != target):
            rank_zero_warn(
                f"The run ended at step {self.step} with sparsity {self.masks.sparsity():.4f}, before the update to "
                f"{target} at step {final}. Train longer, or prune earlier; steps that a gradient scaler skips do not "
                "count."
            )

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
        self._before = 0, 0
        self._follower = None
        self._updated_at = -1
        self._final_step = None
        self._held_back = None
        self._logged = {}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.masks.load_state_dict(state)
        self.step = state["step"]
        self.history = [Update(**entry) for entry in state["history"]]

    def _check_owner(self, trainer: L.Trainer) -> None:
        for other in callbacks_of(trainer):
            if isinstance(other, SparsityCallback) and other is not self:
                shared = sorted(self.masks.keys() & other.masks.keys())
                if shared:
                    raise ValueError(
                        f"{shared[0]!r} is pruned by two callbacks, {type(other).__name__} and {type(self).__name__}. "
                        "Give them selections without a common parameter."
                    )

    def _detach(self) -> None:
        """Give back what was taken of the optimizers and checkpoints, and keep neither alive."""
        if self._follower is not None:
            self._follower.detach()
            self._follower = None
        if self._held_back is not None:
            self._held_back.release()
            self._held_back = None

    def _update(self, trainer: L.Trainer, target: float) -> None:
        assert self._follower is not None
        if self.regrow:
            self._follower.refresh_state()  # for what comes back
        trial = is_fast_dev_run(trainer)
        self.history.append(self.masks.update(target, regrow=self.regrow, step=self.step, trial=trial))
        self._masks_changed(trainer)

    def _take_masks(self, trainer: L.Trainer, masks: Mapping[str, Tensor], source: str) -> None:
        """Take over masks that were made elsewhere, as one update; see `Masks.replace`."""
        before = self.masks.kept
        self.masks.replace(masks, source)
        kept = self.masks.kept
        dropped = {name: before[name] - count for name, count in kept.items()}
        self.history.append(Update(self.step, self.masks.sparsity(), kept, dropped, dict.fromkeys(kept, 0)))
        self._masks_changed(trainer)

    def _masks_changed(self, trainer: L.Trainer) -> None:
        """Let weights and optimizer state follow the masks, and compare these among ranks."""
        self.hold_zeros()
        if trainer.world_size > 1:
            mine = torch.tensor(self.masks.checksum(), device=trainer.strategy.root_device)
            everybody = trainer.strategy.all_gather(mine).flatten().tolist()
            if len(set(everybody)) > 1:
                raise RuntimeError(
                    f"The ranks made different masks at step {self.step} (checksums {everybody}): their weights or "
                    "gradients differ. Do not change weights on one rank alone."
                )

    def _count_step(self) -> None:
        self.step += 1

    def _not_finite(self, names: Iterable[str]) -> str | None:
        """The first of the parameters `names` whose gradient is not finite."""
        found = {name: self.masks.parameter(name).grad for name in names}
        grads = {name: grad for name, grad in found.items() if grad is not None and grad.numel()}
        norms = torch._foreach_norm(list(grads.values()), math.inf) if grads else []
        return next((name for name, norm in zip(grads, norms, strict=True) if not math.isfinite(float(norm))), None)


def _writes_gradients(pl_module: L.LightningModule) -> bool:
    """Whether the module has hooks of its own that run after the callbacks' and before the step."""
    hooks = ("on_before_optimizer_step", "configure_gradient_clipping")
    return any(getattr(type(pl_module), hook) is not getattr(L.LightningModule, hook) for hook in hooks)
