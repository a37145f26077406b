import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.recording import EPOCH, Look, Quiet, Record, RecordLast, imp, masked, recorded
from conformance.harness import (
    PlainModule,
    SaveEverywhere,
    TinyModule,
    assert_same,
    differences,
    fit,
    loaders,
    make_trainer,
    seed_all,
)
from torch import Tensor, nn

from sparsetrain import (
    ERK,
    LAMP,
    IterativeMagnitudePruning,
    LastLR,
    Masks,
    Movement,
    Pruning,
    Random,
    Selection,
    Uniform,
)

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


@pytest.mark.parametrize(("length", "made"), [("2ep", "2ep"), ("10it", "10it")])
def test_rounds_in_a_trainer_that_has_trained_before_are_refused(length, made):
    trainer = make_trainer(max_epochs=-1, max_steps=10)
    trainer.fit(PlainModule(), **loaders())
    trainer.callbacks.append(imp(2, length))
    trainer.fit_loop.epoch_loop.max_steps = -1
    with pytest.raises(ValueError, match=f"This Trainer has made {made} in a fit before"):
        trainer.fit(PlainModule(), **loaders())


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
