"""The length that a Trainer shows while rounds run: one schedule as optimizers are configured, then that of all."""

import lightning as L

from sparsetrain.callbacks.trainer import is_fast_dev_run
from sparsetrain.rounds import Rounds


class ShownLength:
    """Sets a Trainer's `max_epochs` or `max_steps`, and gives it its own back; a trial by `fast_dev_run` is left alone.

    Args:
        trainer: of the fit.
        rounds: in the unit.
        total: length of the run, in the unit.
        unit: "ep" or "it".
        kind: what is counted, "rounds" or "legs", for the error.

    Raises:
        ValueError: the Trainer has another length than the rounds.
    """

    def __init__(self, trainer: L.Trainer, rounds: Rounds, total: int, unit: str, kind: str) -> None:
        epochs, steps = trainer.max_epochs, trainer.max_steps
        fits = (epochs == total and steps == -1) if unit == "ep" else (steps == total and epochs in (-1, None))
        if not (fits or (epochs in (-1, None) and steps == -1) or is_fast_dev_run(trainer)):
            argument = "max_epochs" if unit == "ep" else "max_steps"
            raise ValueError(
                f"A dense phase of {rounds.dense} and {rounds.count} {kind} of {rounds.trained} are {total} "
                f"{'epochs' if unit == 'ep' else 'steps'}; this Trainer has max_epochs={epochs} and "
                f"max_steps={steps}. Use Trainer({argument}={total}), or max_epochs=-1 to have it set."
            )
        self._trainer, self._unit, self._own = trainer, unit, (epochs, steps)

    def show(self, length: int) -> None:
        """Let the Trainer be so long, in the unit."""
        if is_fast_dev_run(self._trainer):
            return
        if self._unit == "ep":
            self._trainer.fit_loop.max_epochs = length
        else:
            self._trainer.fit_loop.epoch_loop.max_steps = length

    def release(self) -> None:
        """Give the Trainer its own length back."""
        self._trainer.fit_loop.max_epochs, self._trainer.fit_loop.epoch_loop.max_steps = self._own
