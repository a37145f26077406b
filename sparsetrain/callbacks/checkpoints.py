"""Monitored checkpoints wait for the final sparsity, or the best one would be of the dense phase."""

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class HeldBackCheckpoints:
    """The Trainer's `ModelCheckpoint`s with a monitor, which keep nothing between construction and `release`.

    One with `save_last` goes on saving the last checkpoint, so that the run can be resumed.

    Args:
        callbacks: the Trainer's.
    """

    def __init__(self, callbacks: Iterable[L.Callback]) -> None:
        self._settings = {
            callback: (callback.save_top_k, callback.save_last)
            for callback in callbacks
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k != 0
        }
        for callback in self._settings:
            callback.save_top_k = 0
            if callback.save_last:
                # By itself it saves the last one only after one of the best, except for links to a saved one.
                callback.save_last = "link"
                callback._last_checkpoint_saved = callback._last_checkpoint_saved or "none yet"

    def __len__(self) -> int:
        return len(self._settings)

    def release(self) -> None:
        """Give the checkpoints their settings back; may be called again."""
        for callback, (save_top_k, save_last) in self._settings.items():
            callback.save_top_k, callback.save_last = save_top_k, save_last
        self._settings = {}
