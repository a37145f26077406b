import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.recording import EPOCH, Record, RecordLast, imp, one_round, recorded
from conformance.harness import BATCH, STEPS, Run, TinyModule, fit, loaders, make_trainer, samples, seed_all
from conformance.test_exact_resume import Setting, resume_everywhere
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from sparsetrain import LastLR
from sparsetrain.data import InMemoryLoader

# Order of data and random numbers


def epochs(record: Record) -> list[list[int]]:
    """The labels of each epoch, in the order of training."""
    labels = [label for batch in sorted(record.labels) for label in record.labels[batch]]
    return [labels[i : i + BATCH * EPOCH] for i in range(0, len(labels), BATCH * EPOCH)]


def trained_on(seed: int = 3, **choices: Any) -> list[list[int]]:
    """The labels of each epoch of a run whose generators were seeded with `seed` and its loader with 0."""
    record = RecordLast()
    seed_all(seed)
    make_trainer(imp(**choices), record, max_epochs=-1).fit(TinyModule(), **loaders())
    return epochs(record)


def test_each_round_has_its_own_order_and_the_dense_phase_that_of_the_loader():
    first = trained_on(rounds=3)
    assert len(first) == 8
    assert len({tuple(order) for order in first}) == 8
    assert len({tuple(sorted(order)) for order in first}) == 1  # every sample once an epoch
    record = Record()
    fit(record, max_epochs=2)
    assert first[:2] == epochs(record)


def test_the_order_of_rounds_is_a_function_of_the_seed():
    once, other = trained_on(), trained_on(seed=4)
    assert once == trained_on()
    assert once[:2] == other[:2]  # the loader's own
    assert all(ours != theirs for ours, theirs in zip(once[2:], other[2:], strict=True))


@pytest.mark.slow
def test_the_order_of_an_epoch_depends_on_its_round_and_its_place_in_the_schedule_alone():
    # (round, epoch of the schedule) -> labels
    whole = trained_on(rounds=2, length="3ep")
    places = dict(zip([(r, e) for r in range(3) for e in range(3)], whole, strict=True))
    for rewind_to in (1, 2):
        orders = trained_on(rounds=2, length="3ep", rewind_to=f"{rewind_to}ep", weights="rewind")
        later = [(r, e) for r in (1, 2) for e in range(rewind_to, 3)]
        assert orders == [places[0, e] for e in range(3)] + [places[place] for place in later]
        without = trained_on(rounds=2, length="3ep", rewind_to=f"{rewind_to}ep", dense_length="0it")
        assert without == [places[place] for place in later]


@pytest.mark.parametrize(("rewind_to", "epoch0"), [("0ep", (2, 4)), ("1ep", (1, 2))])
def test_loaders_are_told_the_first_epoch_of_each_round(rewind_to, epoch0):
    told = []

    class Loader(InMemoryLoader):
        def reseed(self, seed: int, epoch0: int = 0) -> None:
            super().reseed(seed, epoch0)
            if (seed, epoch0) not in told:
                told.append((seed, epoch0))

    images, labels = samples()
    train = Loader(images, labels, batch_size=BATCH, mean=[128.0], std=[64.0], shuffle=True)
    recorded(imp(rewind_to=rewind_to), data={**loaders(), "train_dataloaders": train})
    assert [first for _, first in told] == [0, *epoch0]
    assert len({seed for seed, _ in told}) == 3


class Data(L.LightningDataModule):
    """New loaders whenever the Trainer asks."""

    def train_dataloader(self) -> InMemoryLoader:
        return loaders()["train_dataloaders"]

    def val_dataloader(self) -> InMemoryLoader:
        return loaders()["val_dataloaders"]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
def test_loaders_that_are_made_anew_each_epoch_have_the_same_order():
    record = RecordLast()
    seed_all(3)
    trainer = make_trainer(imp(rewind_to="1ep"), record, max_epochs=-1, reload_dataloaders_every_n_epochs=1)
    trainer.fit(TinyModule(), datamodule=Data())
    assert epochs(record) == trained_on(rewind_to="1ep")


def test_every_loader_of_several_has_the_rounds_order():
    class Two(TinyModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen = [*getattr(self, "seen", []), (batch["one"][1].tolist(), batch["two"][1].tolist())]
            return super().training_step(batch["one"], batch_idx)

    both = {name: loaders()["train_dataloaders"] for name in ("one", "two")}
    run = fit(imp(), make=Two, max_epochs=-1, data={**loaders(), "train_dataloaders": both})
    assert all(one == two for one, two in run.module.seen)
    assert [label for one, _ in run.module.seen for label in one] == [
        label for epoch in trained_on() for label in epoch
    ]


class Drawing(TinyModule):
    """Notes the first random numbers of each batch; draws as many more as its class attribute says at the beginning."""

    more = 0

    def on_train_start(self) -> None:
        self.drawn: list[tuple[float, ...]] = []
        for _ in range(self.more):
            random.random(), np.random.rand(), torch.rand(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
        return super().training_step(batch, batch_idx)


class DrawingMore(Drawing):
    more = 3


@pytest.mark.parametrize(("length", "unit"), [("2ep", "epochs"), ("7it", "steps")])
def test_the_random_numbers_of_a_round_do_not_depend_on_what_was_drawn_before(length, unit):
    few, many = (recorded(imp(length=length), make=make)[0].module.drawn for make in (Drawing, DrawingMore))
    dense = 10 if unit == "epochs" else 7
    assert few != many
    assert all(one != two for one, two in zip(few[:dense], many[:dense], strict=True))
    assert few[dense:] == many[dense:]
    assert len(set(few)) == len(few)


# Counting


STEP_RUNS = {
    "kept": {},
    "rewound": {"weights": "rewind", "rewind_to": "2it", "optimizer_state": "snapshot"},
    "fine_tuned": {"retrain": LastLR()},
}


@pytest.mark.parametrize("choices", STEP_RUNS.values(), ids=STEP_RUNS)
def test_lengths_in_steps_begin_rounds_within_an_epoch(choices):
    callback = imp(length="7it", **choices)
    run, record = recorded(callback, max_epochs=-1, max_steps=int(callback.length[:-2]))
    trained = 5 if "rewind_to" in choices else 7
    assert [record.starts[b].round for b in sorted(record.starts)] == [0] * 7 + [1] * trained + [2] * trained
    assert [update.step for update in run.callback.history] == [7, 7 + trained]
    if "retrain" not in choices:
        rates = list(record.rates.values())
        assert rates == list(one_round(TinyModule, max_epochs=-1, max_steps=7).values()) + 2 * rates[7 - trained : 7]


# No run here is a whole number of epochs long: those of dense runs are resumed without their last validation, too.
@pytest.mark.slow
@pytest.mark.parametrize("choices", STEP_RUNS.values(), ids=STEP_RUNS)
def test_a_run_counted_in_steps_resumes_bit_identically_from_each_checkpoint(tmp_path, choices):
    def make() -> list[L.Callback]:
        return [imp(length="7it", **choices)]

    steps = int(make()[0].length[:-2])
    setting = Setting("steps", trainer={"max_epochs": -1, "max_steps": steps})
    assert not resume_everywhere(tmp_path, make, setting)


@pytest.mark.parametrize(
    ("length", "total", "dense"),
    [("1ep", 9, 5), ("4it", 12, 7)],  # batches 0-1, 2-3, 4 of an epoch make its 3 steps
)
def test_with_accumulated_gradients_rounds_begin_with_the_first_batch_of_a_step(length, total, dense):
    run, record = recorded(imp(length=length), accumulate_grad_batches=2)
    batches = [record.starts[batch].round for batch in sorted(record.starts)]
    assert run.callback.step == total
    assert batches == ([0] * 5 + [1] * 5 + [2] * 5 if length == "1ep" else [0] * 7 + [1] * 7 + [2] * 6)
    assert batches.count(0) == dense
    assert [update.step for update in run.callback.history] == [total // 3, 2 * total // 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices", [{"length": "1ep"}, {"length": "4it", "rewind_to": "1it", "weights": "rewind"}], ids=str
)
def test_with_accumulated_gradients_each_checkpoint_resumes_bit_identically(tmp_path, choices):
    setting = Setting("accumulate", trainer={"max_epochs": -1, "accumulate_grad_batches": 2})
    assert not resume_everywhere(tmp_path, lambda: [imp(**choices)], setting)


@pytest.mark.parametrize(
    ("choices", "settings", "ends"),
    [
        ({"length": "1ep"}, {}, [4, 9, 14]),
        ({"length": "1ep", "dense_length": "0it"}, {}, [4, 9]),
        ({"length": "2ep", "rewind_to": "1ep"}, {}, [9, 14, 19]),
        ({"length": "7it"}, {}, [6, 13, 20]),
        ({"length": "1ep"}, {"accumulate_grad_batches": 2}, [4, 9, 14]),
        ({"length": "4it"}, {"accumulate_grad_batches": 2}, [6, 13, 19]),
    ],
)
def test_ends_round_tells_the_last_batch_of_each(choices, settings, ends):
    class Ends(L.Callback):
        found: list[int]

        def on_train_start(self, *_: Any) -> None:
            self.found = []

        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if callback.ends_round(trainer, batch_idx):
                self.found.append(trainer.fit_loop.total_batch_idx)

    class EndsLast(Ends, Checkpoint):
        pass

    callback, before, after = imp(**choices), Ends(), EndsLast()
    fit(callback, before, after, max_epochs=-1, **settings)
    assert before.found == after.found == ends


def overflowing(*batches: int) -> type[TinyModule]:
    """Its loss is infinite on these batches, counted from 1."""

    class Overflowing(TinyModule):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if self.trainer.fit_loop.total_batch_idx + 1 in batches else loss

    return Overflowing


def scaled(*batches: int, **choices: Any) -> tuple[Run, Record]:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    return recorded(imp(length="1ep", **choices), make=overflowing(*batches), plugins=[precision])


# Lightning calls the scheduler after a step that the scaler has skipped, and torch warns if that is the very first.
@pytest.mark.parametrize("bad", [(4,), (5,), (6,), (2, 3, 10, 11)], ids=str)
def test_steps_that_a_gradient_scaler_skips_do_not_shift_rounds(bad):
    (skipped, record), (clean, whole) = scaled(*bad), scaled()
    assert skipped.callback.step == STEPS - len(bad) == clean.callback.step - len(bad)
    assert [record.starts[b].round for b in range(STEPS)] == [0] * 5 + [1] * 5 + [2] * 5
    assert record.rates == {b: rates for b, rates in whole.rates.items() if b + 1 not in bad}
    assert skipped.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_the_last_round_is_at_its_target_however_many_steps_were_skipped(tmp_path):
    keeper = ModelCheckpoint(tmp_path, monitor="val/loss")
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    callback = imp(length="1ep")
    run = fit(callback, keeper, make=overflowing(2, 3, 4, 7, 8, 9), plugins=[precision])
    assert callback.step == STEPS - 6
    assert callback.at_target
    assert run.trainer.callback_metrics["sparsity/at_target"] == 1.0
    assert Path(keeper.best_model_path).is_file()
