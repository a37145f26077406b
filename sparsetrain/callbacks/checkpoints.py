"""Monitored checkpoints wait for the final sparsity, or the best one would be of the dense phase."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class HeldBackCheckpoints:
    """The Trainer's `ModelCheckpoint`s with a monitor, which keep nothing between construction and `release`.

    One with `save_last` goes on saving the last checkpoint, so that the run can be resumed. One that is held back for
    several callbacks is kept back until the last of them releases it.

    Args:
        callbacks: the Trainer's.
    """

    def __init__(self, callbacks: Iterable[L.Callback]) -> None:
        self._checkpoints = [
            callback
            for callback in callbacks
            if isinstance(callback, ModelCheckpoint)
            and callback.monitor is not None
            and (callback.save_top_k != 0 or callback in _HOLDERS)
        ]
        for callback in self._checkpoints:
            if callback not in _HOLDERS:
                _HOLDERS[callback] = (callback.save_top_k, callback.save_last), WeakSet()
                callback.save_top_k = 0
                if callback.save_last:
                    # By itself it saves the last one only after one of the best, except for links to a saved one.
                    callback.save_last = "link"
                    callback._last_checkpoint_saved = callback._last_checkpoint_saved or "none yet"
            _HOLDERS[callback][1].add(self)

    def __len__(self) -> int:
        return len(self._checkpoints)

    def release(self) -> None:
        """Give the checkpoints their settings back, if nobody else holds them; may be called again."""
        for callback in self._checkpoints:
            settings, holders = _HOLDERS[callback]
            holders.discard(self)
            if not holders:
                callback.save_top_k, callback.save_last = settings
                del _HOLDERS[callback]
        self._checkpoints = []


# The settings of each checkpoint that is held back, and for whom it is.
_HOLDERS: WeakKeyDictionary[ModelCheckpoint, tuple[tuple[int, Any], WeakSet[HeldBackCheckpoints]]] = WeakKeyDictionary()
