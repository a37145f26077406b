import lightning as L
import pytest
import torch
from conformance.harness import STEPS, PlainModule, fit
from conformance.methods import METHODS, every_method
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint

from sparsetrain import GradualMagnitudePruning, Linear, OneShot, Pruning, Selection, SparsityCallback


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
