import inspect
import itertools
import random
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conformance.harness import (
    PlainModule,
    Run,
    SaveEverywhere,
    SaveNowhere,
    assert_same,
    fit,
    loaders,
    samples,
    seed_all,
)
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from sparsetrain.callbacks.resume import ExactResume, _random_state, _set_random_state

FIT = fit_loop._FitLoop
EPOCH = training_epoch_loop._TrainingEpochLoop
EVALUATION = evaluation_loop._EvaluationLoop


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            FIT,
            "restarted_on_epoch_end resumed_on_epoch_end restarted_mid_epoch reset_restart_stage _should_accumulate "
            "is_resuming",
        ),
        (
            EPOCH,
            "restarted_on_train_batch_end update_lr_schedulers reset_restart_stage _should_check_val_epoch "
            "_should_check_val_fx",
        ),
        (EVALUATION, "setup_data skip"),
        (CombinedLoader, "_load_state_dicts flattened"),
        (training_epoch_loop.RestartStage, "RESTARTED_ON_LAST"),
        (evaluation_loop.RestartStage, "RESTARTED_MID_EVALUATION"),
        (_DataFetcher, "__iter__"),
        (L.LightningModule, "_on_before_batch_transfer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lightning_still_has_the_names_that_are_used(owner, names):
    for name in names.split():
        assert hasattr(owner, name), name


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            FIT,
            "_data_fetcher _combined_loader _combined_loader_states_to_load epoch_progress epoch_loop "
            "_last_train_dl_reload_epoch",
        ),
        (EPOCH, "batch_progress val_loop _restart_stage"),
        (EVALUATION, "_has_run _restart_stage"),
        (_Loop, "_restarting _resuming_from_checkpoint"),
        (_LoggerConnector, "_callback_metrics"),
        (ModelCheckpoint, "_last_checkpoint_saved"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lightning_still_sets_the_attributes_that_are_used(owner, names):
    source = inspect.getsource(owner.__init__)
    for name in names.split():
        assert f"self.{name} " in source or f"self.{name}:" in source, name


def test_lightning_still_marks_modules_that_it_compiles():
    assert "_module._compiler_ctx = {" in inspect.getsource(from_compiled)


def test_a_checkpoint_of_weights_alone_is_refused_by_lightning(tmp_path):
    first = fit()
    first.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="only the model"):
        fit(ckpt_path=tmp_path / "weights.ckpt")


def test_lightning_still_sets_the_epoch_of_samplers_and_lets_restarting_be_set():
    assert list(inspect.signature(_set_sampler_epoch).parameters) == ["dataloader", "epoch"]
    assert _Loop.restarting.fset is not None


def test_random_states_go_through_a_checkpoint_unchanged(tmp_path):
    seed_all(5)
    torch.save(_random_state(), tmp_path / "state.pt")
    expected = (torch.rand(3), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())
    seed_all(6)
    _set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()) == expected[1:]


def test_validation_does_not_advance_the_random_streams():
    class Draw(L.Callback):
        def on_validation_batch_start(self, *_: object) -> None:
            torch.rand(1), random.random(), np.random.rand()

    often, never = fit(Draw(), val_check_interval=1), fit(limit_val_batches=0)
    assert often.trace.batches == never.trace.batches


def test_a_second_fit_is_not_taken_for_a_resumed_one(tmp_path):
    first = fit()
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = ExactResume()
    callback.load_state_dict({"random": []})
    callback.setup(first.trainer, first.module, "fit")
    callback.on_train_start(first.trainer, first.module)
    assert callback._restored is None


class ManuallyAccumulating(PlainModule):
    """Steps by itself after every third batch of the run, also across epochs.

    Args:
        cleared: whether validation clears the gradients, as Lightning has it.
    """

    def __init__(self, *, cleared: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.cleared = False, cleared

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 3)
        if (self.trainer.fit_loop.total_batch_idx + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()

    def on_validation_model_zero_grad(self) -> None:
        if self.cleared:
            super().on_validation_model_zero_grad()


@pytest.mark.parametrize("cleared", [True, False])
def test_gradients_accumulated_under_manual_optimization_are_restored_from_every_checkpoint(tmp_path, cleared):
    def train(*callbacks: L.Callback, **settings: Any) -> Any:
        make = partial(ManuallyAccumulating, cleared=cleared)
        return fit(*callbacks, make=make, max_epochs=2, val_check_interval=4, **settings).outcome()

    saver = SaveEverywhere(tmp_path)
    whole = train(saver)
    assert len(saver.saved) == 14
    for saved in saver.saved:
        assert_same(whole, train(SaveNowhere(), ckpt_path=saved.path))


@pytest.mark.parametrize("owner", ["loader", "sampler", "batch_sampler"])
def test_a_plain_loader_with_a_generator_of_its_own_goes_on_from_the_end_of_an_epoch(tmp_path, owner):
    def train(*callbacks: L.Callback, **options: Any) -> Any:
        images, labels = samples()
        dataset = TensorDataset((images.float() - 128) / 64, labels)
        stream = torch.Generator().manual_seed(5)
        sampler = RandomSampler(dataset, generator=stream)
        settings = {
            "loader": {"batch_size": 8, "shuffle": True, "generator": stream},
            "sampler": {"batch_size": 8, "sampler": sampler},
            "batch_sampler": {"batch_sampler": BatchSampler(sampler, 8, drop_last=False)},
        }
        loader = DataLoader(dataset, **settings[owner])
        data = loaders() | {"train_dataloaders": loader}
        return fit(*callbacks, make=PlainModule, data=data, **options).outcome()

    saver = SaveEverywhere(tmp_path)
    whole = train(saver)
    ends = [saved for saved in saver.saved if saved.moment == "epoch"]
    assert len(ends) == 3
    for saved in ends:
        assert_same(whole, train(SaveNowhere(), ckpt_path=saved.path))


def test_resuming_a_run_that_was_saved_without_it_warns(tmp_path):
    saver = SaveEverywhere(tmp_path)
    fit(saver, make=PlainModule, exact=False)
    with pytest.warns(UserWarning, match=r"saved without ExactResume: its random streams begin anew"):
        fit(SaveNowhere(), make=PlainModule, ckpt_path=saver.saved[-1].path)


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("kind", ["in_memory", "plain", "seeded"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_was_saved_at_its_very_end_is_made_longer(tmp_path, kind, steps):
    def train(*callbacks: L.Callback, epochs: int, **options: Any) -> Run:
        images, labels = samples()
        dataset = TensorDataset((images.float() - 128) / 64, labels)
        stream = torch.Generator().manual_seed(5) if kind == "seeded" else None
        plain = {"train_dataloaders": DataLoader(dataset, 8, shuffle=True, generator=stream)}
        data = loaders() | ({} if kind == "in_memory" else plain)
        limits = {"max_epochs": epochs} | ({"max_steps": 1000} if steps else {})
        return fit(*callbacks, make=PlainModule, data=data, **limits, **options)

    last = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)  # which it writes in `on_train_end`
    train(last, epochs=2)
    longer = train(SaveNowhere(), epochs=4, ckpt_path=last.last_model_path)
    assert sorted(longer.trace.batches) == list(range(11, 21))
    whole = train(SaveNowhere(), epochs=4)
    assert_same(dict(whole.module.state_dict()), dict(longer.module.state_dict()))


def test_a_validation_that_the_clock_calls_for_between_two_hooks_rewinds_nothing(monkeypatch):
    class Streams(L.Callback):
        def __init__(self) -> None:
            self.seen: list[bytes] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.seen.append(torch.get_rng_state().numpy().tobytes())

    drawn = random.Random(0)  # some seconds pass each time that one looks at it
    clock = itertools.accumulate(drawn.randint(1, 3) for _ in itertools.count())
    monkeypatch.setattr(training_epoch_loop.time, "monotonic", lambda: float(next(clock)))
    streams = Streams()
    run = fit(streams, make=PlainModule, max_epochs=4, val_check_interval=timedelta(seconds=7))
    assert len(run.trace.validations) > 4
    assert len(set(streams.seen)) == len(streams.seen) == 20
