"""A run that is told to end writes a checkpoint first."""

import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

_REQUEUE = tuple(number for number in signal.Signals if number.name in ("SIGUSR1", "SIGUSR2"))  # none on Windows


class CheckpointOnSignal(Checkpoint):
    """On SIGTERM, SIGUSR1 or SIGUSR2 a run ends its batch and saves a checkpoint before the signal takes effect.

    SIGTERM ends the training, as Lightning does it. For the others somebody's handler has to be there, such as that of
    submitit or of Lightning under Slurm, which queue the job again; within a batch it would find weights, optimizer and
    loader at different steps. While the run validates the handler is called at once: the last checkpoint has to do.

    A run of several processes saves nothing here: they may get the signal in different batches. It is a `Checkpoint`
    so that it comes after the callbacks that it saves; list it last.

    Args:
        path: of the checkpoint, which is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handlers: dict[int, Any] = {}
        self._received: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        present = {number: signal.getsignal(number) for number in _REQUEUE}
        self._handlers = {number: handler for number, handler in present.items() if callable(handler)}
        for number in self._handlers:
            signal.signal(number, partial(self._receive, trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, and let the signal take effect."""
        if self._received is not None or (trainer.received_sigterm and trainer.world_size == 1):
            trainer.save_checkpoint(self.path, weights_only=False)
            self._pass_on()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave later signals to their own handlers, and the one that came after the last batch."""
        self._give_back()
        self._pass_on()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._give_back()

    def _receive(self, trainer: L.Trainer, number: int, frame: FrameType | None) -> None:
        if trainer.training:
            self._received = number
        else:
            self._handlers[number](number, frame)

    def _pass_on(self) -> None:
        number, self._received = self._received, None
        if number is not None:
            self._handlers[number](number, None)

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
