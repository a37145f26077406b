"""Gradual magnitude pruning: the sparsity follows a schedule while the network trains."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.trainer import is_fast_dev_run
from sparsetrain.masks import Pruning
from sparsetrain.schedules import OneShot, Schedule


class GradualMagnitudePruning(SparsityCallback):
    """Prune the smallest weights in many small updates while training goes on; pruned weights stay zero.

    With `OneShot` it is one-shot pruning and fine-tuning; with another criterion in `pruning` it is gradual pruning by
    that score. `fast_dev_run`, too short for any schedule, prunes to the final sparsity at its first step.

    Args:
        schedule: when to update the masks, and to which sparsity.
        pruning: what is pruned, scored and allocated how.
        check: see `SparsityCallback`.

    Raises:
        ValueError: no schedule; at the start of the fit, one that ends beyond the run, or one that a run of another
            length, here resumed, has gone beyond.

    Source: Zhu & Gupta 2017, arXiv:1710.01878.
    Differs: one ranking over all tensors by default, there the same sparsity in each (`Pruning(allocation=Uniform())`);
        masks only shrink, there a hidden weight may come back.
    """

    def __init__(self, schedule: Schedule, *, pruning: Pruning = Pruning(), check: str = "cheap") -> None:
        super().__init__(pruning, check=check)
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"schedule={schedule!r} is no schedule. Give Cubic(0.9, begin='1ep', end='8ep') or another."
            )
        self.schedule = schedule
        self._resolved = schedule

    def prepare(self, trainer: L.Trainer) -> None:
        if is_fast_dev_run(trainer):
            self._resolved = OneShot(self.schedule.final_sparsity)
            rank_zero_info(f"fast_dev_run: pruning to {self.schedule.final_sparsity} at the first step.")
        else:
            self._resolved = self.schedule.resolve(self.run)

    def take_hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().take_hold(trainer, pl_module)
        if self._restored is not None and not is_fast_dev_run(trainer):
            self._check_resumed()

    def target(self, step: int) -> float | None:
        return self._resolved.target(step) if self._resolved.is_update(step) else None

    def final_step(self) -> int:
        return self._resolved.last_update

    def _check_resumed(self) -> None:
        """Raise unless the schedule goes on from the sparsity that the run had when it was saved."""
        if not self.history and self.step <= self.final_step():
            return
        reached = self.history[-1].target if self.history else 0.0
        due = next((step for step in range(self.step, self.final_step() + 1) if self._resolved.is_update(step)), None)
        target = self._resolved.final_sparsity if due is None else self._resolved.target(due)
        if target < reached or (due is None and target > reached):
            when = f"at step {self.final_step()}, which is over" if due is None else f"at step {due}"
            raise ValueError(
                f"The run was saved with sparsity {reached} after {self.step} steps, and in this one, of "
                f"{self.run.total_steps} steps, {self.schedule} asks for {target} {when}. Resume with the max_epochs "
                "and batches of the saved run, or give the schedule that it had in steps, such as end='500it'."
            )
