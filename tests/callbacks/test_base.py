from pathlib import Path

import lightning as L
import pytest
import torch
from conformance.harness import (
    EPOCHS,
    STEPS,
    PlainModule,
    SaveEverywhere,
    SaveNowhere,
    assert_same,
    fit,
    loaders,
    make_trainer,
)
from conformance.methods import METHODS, every_method
from lightning.pytorch.callbacks import (
    Checkpoint,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from sparsetrain import (
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    Linear,
    OneShot,
    Pruning,
    Selection,
    SparsityCallback,
)


class Sawtooth(SparsityCallback):
    """A method of a few lines: sparse at even steps up to the tenth, dense again at odd ones, then sparse."""

    regrow = True

    def target(self, step: int) -> float | None:
        return (0.6 if step % 2 == 0 else 0.0) if step <= 10 else None


class Metrics(Checkpoint):
    """What was logged after each batch; a `Checkpoint`, so that it looks after the callback has logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        found = trainer.callback_metrics
        self.logged.append({name: float(value) for name, value in found.items() if name.startswith("sparsity/")})


def one_shot(**settings: str) -> GradualMagnitudePruning:
    return GradualMagnitudePruning(OneShot(0.8, at=7), **settings)


def test_a_method_that_regrows_needs_only_its_targets():
    callback = fit(Sawtooth()).callback
    assert [update.target for update in callback.history] == [0.6, 0.0] * 5 + [0.6]
    assert all(sum(update.grown.values()) > 0 for update in callback.history[1::2])
    assert callback.masks.sparsity() == pytest.approx(0.6, abs=1e-3)


def test_the_final_step_is_the_first_update_from_which_the_last_target_holds():
    assert fit(Sawtooth()).callback.final_step() == 10

    class Twice(Sawtooth):
        def target(self, step: int) -> float | None:
            return {3: 0.4, 6: 0.6, 9: 0.6}.get(step)

    assert fit(Twice()).callback.final_step() == 6
    assert fit(one_shot()).callback.final_step() == 7


def test_a_method_without_updates_is_final_from_the_start():
    class Never(Sawtooth):
        def target(self, step: int) -> float | None:
            return None

    assert fit(Never()).callback.final_step() == 0


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"max_epochs": -1, "max_steps": 11}])
def test_the_length_of_the_run_is_that_of_its_optimizer_steps(settings):
    run = fit(GradualMagnitudePruning(OneShot(0.5)), **settings)
    assert run.callback.total_steps == run.callback.step == run.trainer.global_step


def test_the_length_in_epochs_is_not_known_where_accumulation_changes():
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    callback = fit(one_shot(), changing, make=PlainModule).callback
    assert callback.total_steps is None
    assert callback.run.steps_per_epoch is None
    with pytest.raises(ValueError, match="'1ep' counts epochs"):
        fit(GradualMagnitudePruning(OneShot(0.8, at="1ep")), changing, make=PlainModule)


def test_lengths_are_resolved_in_steps_of_the_run():
    callback = fit(one_shot()).callback
    assert callback.steps("1ep", "0.2run", 4) == (5, 3, 4)


def test_sparsity_is_logged_after_each_batch():
    metrics = Metrics()
    callback = fit(one_shot(), metrics).callback
    assert len(metrics.logged) == STEPS
    before = {"sparsity/actual": 0.0, "sparsity/target": 0.0, "sparsity/at_target": 0.0}
    assert metrics.logged[:7] == [before] * 7
    for logged in metrics.logged[7:]:
        assert logged["sparsity/actual"] == pytest.approx(callback.masks.sparsity())
        assert logged["sparsity/target"] == pytest.approx(0.8)
        assert logged["sparsity/at_target"] == 1.0


@every_method
def test_the_plan_is_printed_once_and_names_every_parameter(caplog, method):
    with caplog.at_level("INFO"):
        run = fit(method.make())
    pruned = {row.name for row in run.callback.plan if row.pruned}
    assert pruned == set(run.callback.masks)
    weights = sum(mask.numel() for mask in run.callback.masks.values())
    assert caplog.text.count(f"{len(pruned)} of 8 parameters are pruned: {weights:,} of 1,139 weights") == 1
    for name, _ in run.module.named_parameters():
        assert caplog.text.count(f"\n{name} ") == 1
    assert [row.name for row in run.callback.plan] == [name for name, _ in run.module.named_parameters()]


def test_the_state_key_tells_selections_apart():
    one, other = one_shot(pruning=Pruning(Selection(("a.*",)))), one_shot(pruning=Pruning(Selection(("b.*",))))
    assert one.state_key != other.state_key
    assert one.state_key == one_shot(pruning=Pruning(Selection(("a.*",)))).state_key
    assert one.state_key.startswith("GradualMagnitudePruning(")


@every_method
def test_state_is_never_empty_and_is_tensors_and_primitives(tmp_path, method):
    callback = method.make()
    assert callback.state_dict()["step"] == 0
    state = fit(callback).callback.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == state.keys()
    assert state["step"] == STEPS


def test_the_callback_stands_after_averaging_and_before_the_first_checkpoint(tmp_path):
    callback, keeper, averaging = one_shot(), ModelCheckpoint(tmp_path), EMAWeightAveraging()
    callbacks = fit(callback, keeper, averaging).trainer.callbacks
    assert callbacks.index(averaging) < callbacks.index(callback) == callbacks.index(keeper) - 1


def test_a_stage_without_training_leaves_the_callback_alone():
    run = fit(one_shot())
    masks = run.callback.masks
    run.callback.setup(run.trainer, run.module, "test")
    assert run.callback.masks is masks


def test_a_schedule_need_not_end_with_the_last_update():
    callback = fit(GradualMagnitudePruning(Linear(0.9, begin=0, end=3, every=1))).callback
    assert [update.step for update in callback.history] == [0, 1, 2, 3]
    assert callback.at_target


def test_resumed_from_the_end_the_masks_are_there_though_nothing_is_trained(tmp_path):
    full = fit(METHODS[0].make())
    full.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = fit(METHODS[0].make(), ckpt_path=tmp_path / "last.ckpt")
    assert again.trace.batches == {}
    assert all(torch.equal(again.callback.masks[name], mask) for name, mask in full.callback.masks.items())
    assert again.callback.history == full.callback.history


def test_validation_after_the_fit_leaves_the_weights_that_it_is_given(tmp_path):
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run = fit(one_shot(), every)
    dense = tmp_path / "epoch=0.ckpt"
    given = torch.load(dense, weights_only=True)["state_dict"]
    run.trainer.validate(run.module, loaders()["val_dataloaders"], ckpt_path=dense, verbose=False)
    assert_same(run.module.state_dict(), given)
    run.trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert_same(torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"], given)


class Tuning(L.Callback):
    """Saves at the start of the fit and loads that again, as Lightning's finders of learning rates and sizes do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        trainer._checkpoint_connector.restore(self.path)


@every_method
def test_a_state_saved_before_training_is_taken_for_none(tmp_path, method):
    tuned, plain = fit(Tuning(tmp_path / "tuned.ckpt"), method.make()), fit(method.make())
    assert_same(dict(tuned.callback.masks), dict(plain.callback.masks))
    assert_same(tuned.module.state_dict(), plain.module.state_dict())
    assert tuned.callback.step == STEPS


def test_a_learning_rate_finder_goes_before_a_sparse_run(tmp_path):
    class Found(PlainModule):
        lr = 0.1

    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    callback = fit(finder, one_shot(), make=Found, default_root_dir=tmp_path).callback
    assert callback.step == STEPS
    assert callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_a_resumed_run_keeps_its_masks_though_a_tuner_saves_and_loads_before_it(tmp_path):
    saver = SaveEverywhere(tmp_path)
    full = fit(one_shot(), saver, make=PlainModule)
    path = next(saved.path for saved in saver.saved if saved.batches == 10)
    resumed = fit(one_shot(), Tuning(tmp_path / "tuned.ckpt"), make=PlainModule, ckpt_path=path).callback
    assert resumed.history == full.callback.history
    assert_same(dict(resumed.masks), dict(full.callback.masks))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_elements_is_passed_over():
    class Empty(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.none = torch.nn.Linear(0, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) + self.none(images.flatten(1)[:, :0]).sum()

    callback = fit(one_shot(), make=Empty).callback
    assert callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
def test_the_epoch_that_weight_averaging_adds_for_batch_norm_is_no_part_of_the_run():
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    run = fit(averaging, GradualMagnitudePruning(OneShot(0.8, at="0.9run")), make=PlainModule)
    assert run.trainer.current_epoch == EPOCHS + 1
    assert run.callback.total_steps == STEPS
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_second_fit_of_the_same_trainer_is_as_long_as_what_is_left_also_when_it_is_resumed(tmp_path, unit):
    def half() -> GradualMagnitudePruning:
        return GradualMagnitudePruning(OneShot(0.8, at="0.5run"))

    callback, saver = half(), SaveEverywhere(tmp_path)
    first, second = ({"max_epochs": 2}, 5) if unit == "epochs" else ({"max_epochs": -1, "max_steps": 10}, 25)
    trainer, module = make_trainer(callback, saver, **first), PlainModule()
    trainer.fit(module, **loaders())
    assert [update.step for update in callback.history] == [5]
    if unit == "epochs":
        trainer.fit_loop.max_epochs = second
    else:
        trainer.fit_loop.epoch_loop.max_steps = second
    trainer.fit(module, **loaders())
    assert callback.total_steps == callback.step == 15
    assert [update.step for update in callback.history] == [8]
    whole = {"max_epochs": 5} if unit == "epochs" else {"max_epochs": -1, "max_steps": 25}
    path = next(saved.path for saved in saver.saved if saved.batches == 13)
    resumed = fit(half(), SaveNowhere(), make=PlainModule, ckpt_path=path, **whole).callback
    assert resumed.history == callback.history
    assert resumed.total_steps == 15


class Manual(PlainModule):
    """Steps two optimizers on each batch."""

    automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_max_steps_is_no_length_where_it_counts_the_steps_of_several_optimizers():
    callback = GradualMagnitudePruning(OneShot(0.8, at="0.9run"))
    with pytest.raises(ValueError, match=r"no fixed end.*with several optimizers only max_epochs tells it"):
        fit(callback, make=Manual, max_epochs=-1, max_steps=2 * STEPS)
    assert fit(callback, make=Manual).callback.total_steps == STEPS
    assert callback.history[-1].step == 14
    with pytest.raises(ValueError, match=r"counts the steps of all 2 optimizers.*would be cut short at 15it"):
        fit(IterativeMagnitudePruning(2, "5it", sparsity=0.8), make=Manual, max_epochs=-1)
    assert fit(IterativeMagnitudePruning(2, "1ep", sparsity=0.8), make=Manual).callback.round == 2


def test_a_run_that_ends_before_its_final_sparsity_warns():
    class Stopping(PlainModule):
        def on_train_batch_end(self, *_: object) -> None:
            self.trainer.should_stop = self.trainer.global_step == 6

    with pytest.warns(UserWarning, match=r"ended at step 6 with sparsity 0.0000, before the update to 0.8 at step 7"):
        fit(one_shot(), make=Stopping)
    with pytest.warns(UserWarning, match=r"ended at step 6 of 15, in round 1 of 2, with sparsity 0.55"):
        fit(IterativeMagnitudePruning(2, "1ep", sparsity=0.8), make=Stopping)
