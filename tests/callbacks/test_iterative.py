import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.recording import EPOCH, Look, Quiet, Record, RecordLast, imp, masked, one_round, recorded
from conformance.harness import (
    BATCH,
    STEPS,
    PlainModule,
    Run,
    SaveEverywhere,
    TinyModule,
    assert_same,
    differences,
    fit,
    loaders,
    make_trainer,
    samples,
    seed_all,
)
from conformance.test_exact_resume import Setting, resume_everywhere
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from sparsetrain import (
    ERK,
    LAMP,
    AdaptiveLR,
    IterativeMagnitudePruning,
    LastLR,
    Magnitude,
    Masks,
    Movement,
    Pruning,
    Random,
    ReplayLR,
    Saliency,
    Selection,
    Uniform,
)
from sparsetrain.data import InMemoryLoader

# Weights


@pytest.mark.parametrize(("rewind_to", "place", "starts"), [("0ep", 0, (10, 20)), ("1ep", 5, (10, 15))])
def test_rewound_weights_and_buffers_are_those_of_the_step_k_under_the_rounds_mask(rewind_to, place, starts):
    before = Record()
    run, after = recorded(imp(weights="rewind", rewind_to=rewind_to), before)
    for number, start in enumerate(starts, 1):
        assert (before.starts[start].round, after.starts[start].round) == (number - 1, number)
        origin, now = before.starts[place].module, after.starts[start]
        assert any(name.endswith("running_mean") for name in origin)
        assert int(now.module["body.1.num_batches_tracked"]) == place
        assert not all(mask.all() for mask in now.masks.values())
        assert_same(now.module, masked(origin, now.masks))
        assert list(differences(before.starts[start].module, now.module))  # training had moved them
    assert run.callback.step == max(after.ends) + 1


def test_rewound_weights_are_those_of_step_k_in_runs_resumed_in_any_round(tmp_path):
    def make() -> IterativeMagnitudePruning:
        return imp(rounds=3, weights="rewind", rewind_to="1ep")

    saver, whole = SaveEverywhere(tmp_path), Record()
    recorded(make(), saver, whole)
    for saved in saver.saved:
        if saved.batches in (7, 17) and saved.moment == "batch":  # in the dense phase and in the second round
            _, part = recorded(make(), ckpt_path=saved.path)
            for start in (10, 15, 20):
                if start >= saved.batches:
                    now = part.starts[start]
                    assert_same(now.module, masked(whole.starts[5].module, now.masks))


@pytest.mark.parametrize("rewind_to", ["0ep", "1ep"])
def test_kept_weights_and_buffers_are_those_trained_before_under_the_rounds_mask(rewind_to):
    before = Record()
    _, after = recorded(imp(rewind_to=rewind_to), before)
    starts = [start for start in after.starts if after.starts[start].round > before.starts[start].round]
    assert starts == ([10, 20] if rewind_to == "0ep" else [10, 15])
    for start in starts:
        now = after.starts[start]
        assert_same(now.module, masked(after.ends[start - 1].module, now.masks))
        assert_same(before.starts[start].module, after.ends[start - 1].module)


# Masks


def reference_masks(weights: Mapping[str, Tensor], old: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The n - floor(s * n + 0.5) largest |w| of those kept before, by a stable sort: among equals the lower index."""
    scores = np.concatenate([np.where(m, weights[name].abs().double(), -1.0).reshape(-1) for name, m in old.items()])
    kept = len(scores) - math.floor(sparsity * len(scores) + 0.5)
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[np.argsort(-scores, kind="stable")[:kept]] = True
    ends = np.cumsum([mask.numel() for mask in old.values()])[:-1]
    return {
        name: torch.from_numpy(part).view(old[name].shape)
        for name, part in zip(old, np.split(chosen, ends), strict=True)
    }


class Coarse(L.Callback):
    """Rounds all weights after each step, so that many have one magnitude."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(16).round_().div_(16)


@pytest.mark.parametrize("others", [(), (Coarse(),)], ids=["as_trained", "tied"])
@pytest.mark.parametrize("weights", ["keep", "rewind"])
@pytest.mark.parametrize("goal", [{"sparsity": 0.8}, {"per_round": 0.37}], ids=["sparsity", "per_round"])
def test_each_rounds_mask_is_that_of_a_stable_sort_of_the_weights_the_last_round_trained(others, weights, goal):
    run, record = recorded(imp(rounds=4, length="1ep", weights=weights, **goal), *others)
    for number in range(1, 5):
        start = EPOCH * number
        sparsity = 1 - 0.63**number if "per_round" in goal else 1 - (1 - 0.8) ** (number / 4)
        trained, now = record.ends[start - 1], record.starts[start]
        assert_same(now.masks, reference_masks(trained.module, trained.masks, sparsity))
        assert all(not (now.masks[name] & ~trained.masks[name]).any() for name in now.masks)  # nested
        total = sum(mask.numel() for mask in now.masks.values())
        kept = total - math.floor(sparsity * total + 0.5)
        assert sum(int(mask.sum()) for mask in now.masks.values()) == kept
        assert sum(run.callback.history[number - 1].kept.values()) == kept
    if others:
        sizes = torch.cat([record.ends[EPOCH - 1].module[name].abs().flatten() for name in run.callback.masks])
        assert len(sizes.unique()) < len(sizes) / 20


def test_masks_change_only_as_a_round_begins():
    _, record = recorded(imp(rounds=3, length="1ep"))
    changes = [b for b in record.starts if b and list(differences(record.ends[b - 1].masks, record.starts[b].masks))]
    assert changes == [5, 10, 15]
    assert all(not list(differences(record.starts[b].masks, record.ends[b].masks)) for b in record.starts)


@pytest.mark.parametrize(
    "pruning",
    [
        Pruning(criterion=Movement()),
        Pruning(criterion=Random(2)),
        Pruning(allocation=LAMP()),
        Pruning(allocation=ERK()),
        Pruning(allocation=Uniform()),
    ],
    ids=str,
)
def test_masks_are_exact_and_nested_by_other_criteria_and_allocations(pruning):
    _, record = recorded(imp(rounds=3, length="1ep", pruning=pruning, weights="rewind"))
    for number in range(1, 4):
        before, now = record.ends[EPOCH * number - 1].masks, record.starts[EPOCH * number].masks
        total, sparsity = 1108, 1 - 0.2 ** (number / 3)
        assert sum(int(mask.sum()) for mask in now.values()) == total - math.floor(sparsity * total + 0.5)
        assert all(not (now[name] & ~before[name]).any() for name in now)


def test_what_is_pruned_is_that_which_the_pruning_says():
    run, _ = recorded(imp(pruning=Pruning(Selection(include=("body.*",)))))
    assert set(run.callback.masks) == {"body.0.weight", "body.5.weight"}
    assert run.module.head.weight.all()


# Gradients


class Batches(L.Callback):
    def __init__(self) -> None:
        self.batches: dict[int, tuple[Tensor, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Quiet, *_: Any) -> None:
        self.batches[trainer.fit_loop.total_batch_idx] = pl_module.seen


def gradients(look: Look, masks: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of a plain module with the weights and buffers of `look`; zero where pruned."""
    module = Quiet()
    module.load_state_dict(masked(look.module, masks))
    nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
    return masked({name: p.grad for name, p in module.named_parameters()}, masks)


class PrunesLate(L.Callback):
    """One-shot pruning as a naive callback has it: after the gradients of the step were computed."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 10:
            self.masks = Masks()
            self.masks.bind(pl_module)
            self.masks.update(0.8)
            self.masks.apply_()
        if trainer.global_step >= 10:
            self.masks.zero_grads_()


@pytest.mark.parametrize("weights", ["keep", "rewind"])
def test_the_first_gradients_of_a_round_are_those_of_the_pruned_and_rewound_weights(weights):
    batches = Batches()
    _, record = recorded(imp(rounds=2, length="2ep", weights=weights), batches, make=Quiet)
    for start in (10, 20):
        now = record.starts[start]
        assert_same(record.grads[start], gradients(now, now.masks, batches.batches[start]))


def test_pruning_just_before_the_step_would_step_with_gradients_of_the_weights_before():
    naive, batches, record = PrunesLate(), Batches(), RecordLast()
    fit(naive, batches, record, make=Quiet, max_epochs=4)
    before = record.ends[9]
    wanted = gradients(before, naive.masks, batches.batches[10])
    dense = {name: torch.ones_like(mask) for name, mask in naive.masks.items()}
    late = masked(gradients(before, dense, batches.batches[10]), naive.masks)
    assert_same(record.grads[10], late)
    assert len(list(differences(record.grads[10], wanted))) == len(wanted)


# What the module sees


class Asking(TinyModule):
    """Notes the length of the run whenever it can."""

    def ask(self, moment: str) -> None:
        trainer = self.trainer
        self.told = getattr(self, "told", {})
        self.told[moment] = trainer.max_epochs, trainer.max_steps, int(trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        self.ask("configure")
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self.ask("fit start")

    def on_train_start(self) -> None:
        self.ask("train start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.ask("batch start")

    def on_train_end(self) -> None:
        self.ask("train end")


@pytest.mark.parametrize(
    ("callback", "settings", "configure", "later"),
    [
        (imp(2, "2ep"), {"max_epochs": 6}, (2, -1, 10), (6, -1, 30)),
        (imp(2, "2ep"), {"max_epochs": -1}, (2, -1, 10), (6, -1, 30)),
        (imp(2, "2ep", rewind_to="1ep"), {"max_epochs": 4}, (2, -1, 10), (4, -1, 20)),
        (imp(2, "2ep", dense_length="0it"), {"max_epochs": 4}, (2, -1, 10), (4, -1, 20)),
        (imp(2, "1ep", dense_length="3ep"), {"max_epochs": 5}, (3, -1, 15), (5, -1, 25)),
        (imp(2, 7), {"max_epochs": -1, "max_steps": 21}, (-1, 7, 7), (-1, 21, 21)),
        (imp(2, "7it", rewind_to="3it"), {"max_epochs": -1}, (-1, 7, 7), (-1, 15, 15)),
    ],
)
def test_configure_optimizers_sees_the_length_of_its_schedule_and_everything_later_the_whole(
    callback, settings, configure, later
):
    run = fit(callback, make=Asking, **settings)
    told = run.module.told
    assert told.pop("configure") == configure
    assert told == dict.fromkeys(("fit start", "train start", "batch start", "train end"), later)
    assert (run.trainer.max_epochs, run.trainer.max_steps) == (settings["max_epochs"], settings.get("max_steps", -1))
    assert run.callback.step == later[2]


class Raising(Asking):
    """Raises at the moment that its class attribute names."""

    at = ""

    def ask(self, moment: str) -> None:
        super().ask(moment)
        if moment == self.at:
            raise RuntimeError("out of luck")


@pytest.mark.parametrize("at", ["configure", "fit start", "train start", "batch start", "train end"])
@pytest.mark.parametrize("settings", [{"max_epochs": 6}, {"max_epochs": -1}])
def test_the_trainer_gets_its_length_back_after_an_exception(monkeypatch, at, settings):
    monkeypatch.setattr(Raising, "at", at)
    trainer = make_trainer(imp(2, "2ep", retrain=LastLR()), **settings)
    seed_all(3)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(Raising(), **loaders())
    assert (trainer.max_epochs, trainer.max_steps) == (settings["max_epochs"], -1)


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


# Controls


def test_at_sparsity_0_nothing_is_pruned_and_the_rates_are_those_of_the_sparse_run():
    sparse, control = recorded(imp()), recorded(imp(sparsity=0.0))
    assert control[0].callback.masks.sparsity() == 0
    assert control[1].rates == sparse[1].rates
    assert control[1].labels == sparse[1].labels
    assert control[0].callback.step == sparse[0].callback.step
    assert [look.round for look in control[1].starts.values()] == [look.round for look in sparse[1].starts.values()]


@pytest.mark.parametrize("choices", [{"sparsity": 0.0}, {}, {"weights": "rewind"}, {"retrain": LastLR()}], ids=str)
def test_the_dense_phase_is_the_run_without_the_callback_bit_for_bit(choices):
    (_, record), dense, plain = recorded(imp(**choices)), RecordLast(), Record()
    run = fit(plain, dense, max_epochs=2)
    assert_same(record.ends[9].module, dict(run.module.state_dict()))
    for batch in range(10):
        assert_same(record.ends[batch].module, dense.ends[batch].module)
        assert_same(record.ends[batch].optimizer, dense.ends[batch].optimizer)
        assert record.rates[batch] == dense.rates[batch]


def test_at_sparsity_0_a_kept_round_trains_on_from_the_dense_networks_weights():
    _, record = recorded(imp(sparsity=0.0))
    for start in (10, 20):
        assert_same(record.starts[start].module, record.ends[start - 1].module)
        assert_same(record.starts[start].optimizer, record.ends[start - 1].optimizer)


@pytest.mark.parametrize("batches", [True, 3])
@pytest.mark.parametrize(
    "choices",
    [{}, {"weights": "rewind", "optimizer_state": "reset"}, {"retrain": LastLR()}, {"dense_length": "0it"}],
    ids=str,
)
def test_fast_dev_run_prunes_to_the_final_sparsity_at_its_first_step_and_says_so(caplog, batches, choices):
    with caplog.at_level("INFO"):
        run = fit(imp(length="40ep", **choices), make=PlainModule, fast_dev_run=batches)
    assert [(update.step, update.target) for update in run.callback.history] == [(0, 0.8)]
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)
    assert run.callback.step == int(batches)
    assert "fast_dev_run: pruning to 0.8 at the first step." in caplog.text


# What goes together


class Manual(TinyModule):
    """Steps its optimizer and its scheduler itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return loss


@pytest.mark.parametrize("rewind_to", ["0ep", "1ep"])
def test_manual_optimization_replays_the_rates_that_the_module_steps(rewind_to):
    run, record = recorded(imp(rewind_to=rewind_to), make=Manual)
    rates = list(record.rates.values())
    assert rates[10:] == 2 * rates[5 if rewind_to == "1ep" else 0 : 10]
    assert rates == list(recorded(imp(rewind_to=rewind_to))[1].rates.values())
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_manual_optimization_is_refused_where_the_callback_sets_the_rate():
    with pytest.raises(ValueError, match=r"LastLR sets the learning rate itself.*Use ReplayLR\(\), or automatic"):
        recorded(imp(retrain=LastLR()), make=Manual)


class ManualByDefault(Manual):
    """Its scheduler is not said to step at each step, as Lightning does not ask under manual optimization."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))]


@pytest.mark.parametrize(("length", "trained"), [("2ep", 10), (7, 7)])
def test_manual_optimization_may_step_its_scheduler_whenever_it_likes(length, trained):
    for choices in ({}, {"dense_length": "0it"}):
        _, record = recorded(imp(length=length, **choices), make=ManualByDefault)
        rates = list(record.rates.values())
        assert rates == rates[:trained] * (len(rates) // trained)
        assert len(set(rates)) == trained


def test_a_schedule_cannot_be_brought_forward_under_manual_optimization():
    message = r"stepped CosineAnnealingLR before step 5, at which .* Begin with a dense phase, with rewind_to='0it'"
    with pytest.raises(ValueError, match=message):
        recorded(imp(dense_length="0it", rewind_to="1ep"), make=ManualByDefault)


class Foreign:
    """A scheduler as timm has them: not of torch."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class WithForeign(TinyModule):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Foreign(optimizer), "interval": "epoch"}}

    def lr_scheduler_step(self, scheduler: Foreign, metric: Any) -> None:
        scheduler.step(self.current_epoch)


@pytest.mark.parametrize("retrain", [ReplayLR(), LastLR()])
def test_a_scheduler_that_is_not_torchs_is_refused(retrain):
    fit(make=WithForeign)  # Lightning takes it
    with pytest.raises(ValueError, match=r"Foreign is no scheduler of torch\.optim.*one of torch\.optim\.lr_scheduler"):
        recorded(imp(retrain=retrain), make=WithForeign)


@pytest.mark.parametrize("length", ["1ep", "5it"])
def test_a_changing_accumulation_is_refused(length):
    with pytest.raises(ValueError, match=r"how many optimizer steps an epoch has\. Use .* one accumulate_grad_batches"):
        fit(imp(length=length), GradientAccumulationScheduler({1: 2}), make=PlainModule, max_epochs=-1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_loader_without_a_length_is_refused():
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from loaders()["train_dataloaders"]

    trainer = make_trainer(imp(length="2it"), max_epochs=-1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"Use a loader with a length and one accumulate_grad_batches"):
        trainer.fit(PlainModule(), Endless())


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (
            imp(2, "2ep"),
            {"max_epochs": 5},
            r"dense phase of 2 and 2 rounds of 2 are 6 epochs; this Trainer has max_epo",
        ),
        (imp(2, "2ep"), {"max_epochs": 6, "max_steps": 30}, r"has max_epochs=6 and max_steps=30\. Use Trainer\(max_ep"),
        (
            imp(2, "2ep"),
            {"max_epochs": -1, "max_steps": 30},
            r"are 6 epochs; .*max_steps=30\. Use Trainer\(max_epochs=6",
        ),
        (
            imp(2, 7),
            {"max_epochs": -1, "max_steps": 20},
            r"rounds of 7 are 21 steps; .*Use Trainer\(max_steps=21\), or",
        ),
        (
            imp(2, 7),
            {"max_epochs": 5},
            r"are 21 steps; this Trainer has max_epochs=5 and max_steps=-1\. Use Trainer\(max",
        ),
        (
            imp(2, 7, rewind_to=2),
            {"max_epochs": 9, "max_steps": 17},
            r"dense phase of 7 and 2 rounds of 5 are 17 steps",
        ),
    ],
)
def test_a_trainer_of_another_length_or_unit_is_told_the_right_one(callback, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(callback, **settings)


def test_the_callback_says_how_long_the_trainer_has_to_be():
    assert imp(2, "40ep", rewind_to="4ep").length == "112ep"
    assert imp(3, 500, dense_length="2000it").length == "3500it"
    assert fit(imp(2, "1ep"), max_epochs=3).callback.total_steps == 15


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"rounds": 0}, r"rounds is 0; there must be at least 1"),
        ({"length": "0ep"}, r"round_length is 0; a round trains at least one step"),
        ({"length": "1.5ep"}, r"round_length='1\.5ep' must be whole epochs"),
        ({"length": "forty"}, r"round_length: 'forty' is no length"),
        ({"dense_length": "0.1run"}, r"dense_length='0\.1run' must be whole epochs"),
        ({"dense_length": 10}, r"round_length='2ep', dense_length=10 are in two units"),
        ({"rewind_to": "3it"}, r"round_length='2ep', dense_length='2ep', rewind_to='3it' are in two units"),
        ({"rewind_to": "2ep"}, r"rewind_to is 2, but a round is over after 2"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 is no sparsity"),
        ({"sparsity": 80}, r"sparsity=80 is no sparsity: .* Write 0\.8 for 80 %"),
        ({"sparsity": None}, r"sparsity=None and per_round=None: give exactly one"),
        ({"per_round": 1.0}, r"per_round=1\.0 is no sparsity"),
        ({"per_round": 0.2, "sparsity": 0.8}, r"sparsity=0\.8 and per_round=0\.2: give exactly one"),
        ({"weights": "restart"}, r"weights='restart' is unknown\. Choose 'keep', 'rewind'\."),
        ({"optimizer_state": "rewind"}, r"optimizer_state='rewind' is unknown\. Choose 'keep', 'reset', 'snapshot'\."),
        ({"retrain": "LastLR"}, r"retrain='LastLR' is no policy\. Give one such as ReplayLR\(\) or LastLR\(\)\."),
        ({"retrain": LastLR}, r"is no policy\. Give one such as ReplayLR\(\) or LastLR\(\)\."),
        (
            {"weights": "rewind", "dense_length": "3ep"},
            r"weights='rewind' trains each round as the dense phase was trained, but dense_length is 3 and",
        ),
        (
            {"dense_length": "1ep"},
            r"ReplayLR\(\) runs the last 2 of the schedule's 1 again\. Make dense_length at least",
        ),
        (
            {"retrain": AdaptiveLR(), "dense_length": "0ep"},
            r"AdaptiveLR\(\) needs the learning rates of a dense phase, and dense_length=0 leaves none",
        ),
        (
            {"pruning": Pruning(criterion=Saliency())},
            r"Saliency needs gradients, and there are none between two rounds",
        ),
    ],
    ids=str,
)
def test_arguments_that_are_out_of_range_or_do_not_go_together_are_refused(choices, message):
    choices = {"rounds": 2, "length": "2ep"} | choices
    with pytest.raises(ValueError, match=message):
        imp(choices.pop("rounds"), choices.pop("length"), **choices)


@pytest.mark.parametrize(
    "choices",
    [
        {"dense_length": "1ep", "rewind_to": "1ep"},
        {"dense_length": "0it", "weights": "rewind"},
        {"dense_length": "1ep", "retrain": LastLR()},
        {"pruning": Pruning(criterion=Magnitude())},
    ],
    ids=str,
)
def test_arguments_at_their_limits_are_taken(choices):
    recorded(imp(**choices), make=PlainModule)


# Checkpoints


@pytest.mark.parametrize("optimizer_state", ["keep", "snapshot"])
@pytest.mark.parametrize("weights", ["keep", "rewind"])
def test_a_checkpoint_holds_the_snapshot_where_weights_are_rewound_and_loads_safely(tmp_path, weights, optimizer_state):
    before, saver = Record(), SaveEverywhere(tmp_path)
    recorded(imp(rewind_to="1ep", weights=weights, optimizer_state=optimizer_state), before, saver)
    for saved in saver.saved:
        callbacks = torch.load(saved.path, weights_only=True)["callbacks"]
        state = next(state for key, state in callbacks.items() if key.startswith("IterativeMagnitudePruning"))
        taken = saved.batches > 5
        assert state["leg"] == sum(saved.batches > start for start in (10, 15))  # of the network that it holds
        assert (state["snapshot"] is not None) == (weights == "rewind" and taken)
        assert (state["optimizers"] is not None) == (optimizer_state == "snapshot" and taken)
        if state["snapshot"] is not None:
            assert_same(state["snapshot"], before.starts[5].module)


def test_the_round_is_logged():
    class Rounds(L.Callback):
        def __init__(self) -> None:
            self.logged: list[float] = []

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.logged.append(float(trainer.callback_metrics["sparsity/round"]))

    rounds = Rounds()
    recorded(imp(), rounds)
    assert rounds.logged == [0, 0, 1, 1, 2, 2]
