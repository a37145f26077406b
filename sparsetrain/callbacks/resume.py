"""Exact resume: what a checkpoint needs beside Lightning's own state to make a resumed run the uninterrupted one."""

import random
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch


class ExactResume(L.Callback):
    """Saves and restores the random streams of each rank, and the loader's position where Lightning loses it.

    With the loaders of `sparsetrain.data`, or any whose state says which batch comes next, a run resumed from any
    checkpoint goes on bit for bit as if it had not been interrupted. With a plain `DataLoader` that holds for
    checkpoints at the end of an epoch. Validation does not advance the random streams, so a run is the same however
    often it is validated.

    This is the one file that uses private names of Lightning; its test fails if they are renamed.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        mine = _random_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"random": [mine]}
        ranks: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(ranks, mine)  # Lightning asks every rank and keeps rank 0's answer
        return {"random": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["random"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored is None:
            return
        if len(self._restored) != trainer.world_size:
            raise ValueError(
                f"The checkpoint is of a run on {len(self._restored)} processes and cannot be resumed exactly on "
                f"{trainer.world_size}. Use as many devices as before."
            )
        random_state = self._restored[trainer.global_rank]
        loop = trainer.fit_loop
        loader, fetcher = loop._combined_loader, loop._data_fetcher
        assert loader is not None
        assert fetcher is not None
        # Lightning passes the loader's state on only within an epoch, and only when it sets the loader up after loading
        # the checkpoint (it does so earlier when configure_optimizers asks for estimated_stepping_batches).
        loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        for part in loader.flattened:
            _set_sampler_epoch(part, trainer.current_epoch)
        # A new iterator of a DataLoader draws a seed: it did so before a checkpoint within an epoch, and does so after
        # one at its end.
        progress = loop.epoch_loop.batch_progress
        within_epoch = 0 < progress.current.ready < trainer.num_training_batches
        if within_epoch:
            iter(fetcher)
        _set_random_state(random_state)
        if not within_epoch:
            iter(fetcher)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._before_validation = _random_state()  # the iterator of the validation loader draws before any other hook

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._before_validation is not None and not trainer.sanity_checking:
            _set_random_state(self._before_validation)


def _random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and the present CUDA device's generators, in tensors and primitives."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[str, Any, int, int, float], np.random.get_state())
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu())
