"""Exact resume: what a checkpoint needs beside Lightning's own state to make a resumed run the uninterrupted one."""

import random
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sparsetrain.callbacks.trainer import generators_of

T = TypeVar("T")


class ExactResume(L.Callback):
    """Saves and restores what Lightning loses: random streams, the loader's place, accumulated gradients, validations.

    With the loaders of `sparsetrain.data`, or any whose state says which batch comes next (that of torchdata's does not
    if it has a generator of its own), a run resumed from any checkpoint goes on bit for bit as if it had not been
    interrupted. With a plain `DataLoader` that holds for checkpoints at the end of an epoch, but for what its workers
    draw at random if they are persistent. Validation does not advance the random streams, so a run is the same however
    often it is validated. On several processes, gradients accumulated before a checkpoint are restored as their mean,
    which is the same sum in another order. A checkpoint written amid a batch, as by `OnExceptionCheckpoint`, goes on
    with the next batch. Under manual optimization, where only the module knows what it accumulates, gradients are part
    of every checkpoint.

    Private names of Lightning are used here, and one each in `checkpoints`, `recalibration` and `trainer`; tests fail
    if they are renamed.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._loader_states: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restored = None
        self._before_validation = None
        self._loader_states = []

    def state_dict(self) -> dict[str, Any]:
        return {"random": _of_all_ranks(_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            return  # only weights are saved
        state["metrics"] = dict(trainer.callback_metrics)
        state["reloaded"] = trainer.fit_loop._last_train_dl_reload_epoch
        state["generators"] = _of_all_ranks([stream.get_state() for stream in _generators(trainer)])
        if trainer.fit_loop._should_accumulate() or not pl_module.automatic_optimization:
            gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            state["gradients"] = {
                name: trainer.strategy.reduce(gradient.detach(), reduce_op="mean")
                for name, gradient in gradients.items()
            }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # Lightning hands them to the loaders once, and its own iterator uses them up before training starts.
        loops = checkpoint.get("loops")  # None where only weights were saved, which Lightning refuses
        self._loader_states = loops["fit_loop"]["state_dict"].get("combined_loader", []) if loops else []
        if self.state_key not in checkpoint.get("callbacks", {}):
            rank_zero_warn(
                "The run was saved without ExactResume: its random streams begin anew, and the resumed run is another "
                "one. Begin the next run with ExactResume."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stateless = _stateless_loaders(trainer)
        if stateless:
            rank_zero_info("The training loader has no state: resume is exact from checkpoints at the end of an epoch.")
        if any(getattr(part, "persistent_workers", False) for part in stateless):
            rank_zero_info("Its workers are persistent, and what they draw at random begins anew in a resumed run.")
        if self._restored is None:
            return
        ranks = self._restored["random"]
        if len(ranks) != trainer.world_size:
            raise ValueError(
                f"The checkpoint is of a run on {len(ranks)} processes and cannot be resumed exactly on "
                f"{trainer.world_size}. Use as many devices as before."
            )
        for name, gradient in self._restored.get("gradients", {}).items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        trainer._logger_connector._callback_metrics.update(self._restored["metrics"])
        fit = trainer.fit_loop
        epoch_has_ended = fit.resumed_on_epoch_end or fit.restarted_on_epoch_end or _run_has_ended(trainer)
        _mend_progress(trainer)
        streams = self._restored["generators"][trainer.global_rank]
        _restore_loader(trainer, self._loader_states, ranks[trainer.global_rank], streams, epoch_has_ended)
        trainer.fit_loop._last_train_dl_reload_epoch = self._restored["reloaded"]
        self._loader_states = []
        self._before_validation = ranks[trainer.global_rank]  # of the one that was due when the checkpoint was saved
        self._restored = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored is None:
            return
        # Resumed from the end of the run: nothing was left to train, but perhaps the epoch's last schedulers.
        trainer._logger_connector._callback_metrics.update(self._restored["metrics"])
        epochs = trainer.fit_loop.epoch_progress.total
        if epochs.completed < epochs.processed:  # type: ignore[attr-defined]
            trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        _set_random_state(self._restored["random"][trainer.global_rank])
        self._restored = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit = trainer.fit_loop
        assert fit._data_fetcher is not None
        # The iterator of the validation loader draws before its hooks. A validation that is due by the clock may become
        # so between here and there.
        by_clock = trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
        is_due = by_clock or fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        self._before_validation = _random_state() if is_due else None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop._restarting = False  # it is still set where only the end of an epoch was left to do

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._before_validation is not None and not trainer.sanity_checking:
            _set_random_state(self._before_validation)


def _mend_progress(trainer: L.Trainer) -> None:
    """Do what was still to be done at the moment of saving, and is passed over by Lightning's own restart."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    fetcher = fit._data_fetcher
    assert fetcher is not None
    if fit.restarted_on_epoch_end:
        # A step-based run would take the finished epoch up again, run no batch of it and count it twice.
        fit.epoch_progress.increment_completed()
        fit.reset_restart_stage()
        _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]
        epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    elif _run_has_ended(trainer):
        fit.reset_restart_stage()
        epoch.reset_restart_stage()
        _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]
    elif fit.resumed_on_epoch_end:
        epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    elif epoch.restarted_on_train_batch_end:
        _return_to_batch_end(trainer, fetcher)
    fit._restarting = False  # or the end of the epoch leaves out schedulers that read the validation's metric


def _run_has_ended(trainer: L.Trainer) -> bool:
    """Whether the checkpoint was saved behind the end of an epoch, as by a callback's `on_train_end`."""
    fit, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress.total
    begun = fit.resumed_on_epoch_end or fit.restarted_on_epoch_end or fit.epoch_loop.restarted_on_train_batch_end
    return 0 < epochs.ready == epochs.completed and not begun


def _return_to_batch_end(trainer: L.Trainer, fetcher: _DataFetcher) -> None:
    """Let the validation and the end of the epoch follow, if they were about to when the checkpoint was saved."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    progress = epoch.batch_progress
    if progress.is_last_batch and fit.restarted_mid_epoch:
        # FitLoop.reset has counted the epoch as done.
        for counter in (fit.epoch_progress.current, fit.epoch_progress.total):
            counter.processed -= 1  # type: ignore[attr-defined]
            counter.completed = counter.processed  # type: ignore[attr-defined]
    if epoch._should_check_val_epoch():
        trainer.validating = True
        epoch.val_loop.setup_data()  # not done yet where the next epoch is not to be validated
        trainer.training = True
    validation_is_due = epoch._should_check_val_fx(fetcher) and not epoch.val_loop.skip
    if not validation_is_due and not progress.is_last_batch:
        return
    progress.increment_completed()
    if validation_is_due:
        # As if the validation had been interrupted at its first batch.
        epoch._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
        epoch.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
        epoch.val_loop._restarting = False
    else:
        epoch.reset_restart_stage()
        epoch.val_loop._has_run = True


def _stateless_loaders(trainer: L.Trainer) -> list[Any]:
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else [part for part in loader.flattened if not hasattr(part, "state_dict")]


def _generators(trainer: L.Trainer) -> list[torch.Generator]:
    return [stream for part in _stateless_loaders(trainer) for stream in generators_of(part)]


def _restore_loader(
    trainer: L.Trainer,
    states: list[Any],
    random_state: dict[str, Any],
    streams: Sequence[torch.Tensor],
    epoch_has_ended: bool,
) -> None:
    fit = trainer.fit_loop
    loader, fetcher = fit._combined_loader, fit._data_fetcher
    assert loader is not None
    assert fetcher is not None
    for part in loader.flattened:
        _set_sampler_epoch(part, trainer.current_epoch)
    fit._combined_loader_states_to_load = []
    loader._load_state_dicts(states)
    # A new iterator of a DataLoader draws a seed: before the saved moment if that lies within an epoch, else where
    # Lightning makes one for each epoch, after the hooks of its start, which may seed; for the first, before them.
    within_epoch = fit.epoch_loop.batch_progress.current.ready > 0 and not epoch_has_ended
    if within_epoch or states:
        iter(fetcher)  # at an epoch's end the loaded state is that of an iterator that has ended
    _set_random_state(random_state)
    for generator, state in zip(_generators(trainer), streams, strict=False):  # there may be others now
        generator.set_state(state.cpu())
    if not within_epoch and trainer.current_epoch > 0:
        fit._resuming_from_checkpoint = fit.epoch_loop._restarting = False
    elif not within_epoch:
        iter(fetcher)


def _of_all_ranks(mine: T) -> list[T]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    ranks = [mine for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, mine)  # Lightning asks every rank and keeps rank 0's answer
    return ranks


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
