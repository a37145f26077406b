import logging

import lightning as L
import pytest
from conformance.harness import STEPS, TinyModule, fit, loaders, make_trainer

from sparsetrain import Constant, Cubic, GradualMagnitudePruning, OneShot, Pruning, Selection


def test_the_masks_follow_the_schedule_exactly() -> None:
    schedule = Cubic(0.8, begin=2, end=11, every=4)
    callback = fit(GradualMagnitudePruning(schedule)).callback
    assert [update.step for update in callback.history] == [2, 6, 10, 11]
    for update in callback.history:
        total = callback.masks.total
        assert update.target == schedule.target(update.step)
        assert sum(update.kept.values()) == total - int(update.target * total + 0.5)
    assert callback.step == callback.total_steps == STEPS
    assert callback.final_step() == 11


def test_one_shot_is_dense_before_and_sparse_after() -> None:
    callback = fit(GradualMagnitudePruning(OneShot(0.5, at="1ep"))).callback
    (update,) = callback.history
    assert (update.step, update.target) == (5, 0.5)


def test_constant_is_sparse_from_the_first_step() -> None:
    callback = fit(GradualMagnitudePruning(Constant(0.5))).callback
    assert [update.step for update in callback.history] == [0]


def test_fast_dev_run_prunes_at_its_one_step(caplog: pytest.LogCaptureFixture) -> None:
    callback = GradualMagnitudePruning(Cubic(0.8, begin="1ep", end="2ep"))
    with caplog.at_level(logging.INFO):
        make_trainer(callback, fast_dev_run=True).fit(TinyModule(schedule="epoch"), **loaders())
    assert "fast_dev_run: pruning to 0.8 at the first step" in caplog.text
    assert sum(callback.masks.kept.values()) == callback.masks.total - int(0.8 * callback.masks.total + 0.5)


def test_what_is_logged_is_what_the_masks_say() -> None:
    run = fit(GradualMagnitudePruning(OneShot(0.75, at=7)))
    logged = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    assert logged["sparsity/actual"] == pytest.approx(run.callback.masks.sparsity())
    assert logged["sparsity/target"] == pytest.approx(0.75)
    assert logged["sparsity/at_target"] == 1.0


def test_the_plan_names_every_parameter_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = fit(GradualMagnitudePruning(OneShot(0.5), pruning=Pruning(Selection(exclude=("head.*",)))))
    plan = next(record.message for record in caplog.records if record.message.startswith("GradualMagnitudePruning:"))
    for name, _ in run.module.named_parameters():
        assert plan.count(f"{name} ") == 1
    assert "excluded by 'head.*'" in plan
    assert sum(record.message.startswith("GradualMagnitudePruning:") for record in caplog.records) == 1


def test_two_selections_have_two_state_keys() -> None:
    one = GradualMagnitudePruning(OneShot(0.5), pruning=Pruning(Selection(include=("body.*",))))
    other = GradualMagnitudePruning(OneShot(0.9), pruning=Pruning(Selection(include=("head.*",))))
    assert one.state_key != other.state_key
    run = fit(one, other)
    assert one.masks.keys().isdisjoint(other.masks.keys())
    for callback, sparsity in ((one, 0.5), (other, 0.9)):
        assert sum(callback.masks.kept.values()) == callback.masks.total - int(sparsity * callback.masks.total + 0.5)
    assert run.trainer.global_step == STEPS


@pytest.mark.parametrize("schedule", [0.8, "cubic", None])
def test_what_is_no_schedule_is_refused(schedule: object) -> None:
    with pytest.raises(ValueError, match="is no schedule"):
        GradualMagnitudePruning(schedule)  # type: ignore[arg-type]


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(ValueError, match="'off', 'cheap' or 'full'"):
        GradualMagnitudePruning(OneShot(0.5), check="some")


def test_it_pickles_and_copies_before_the_fit() -> None:
    import copy
    import pickle

    callback = pickle.loads(pickle.dumps(copy.deepcopy(GradualMagnitudePruning(OneShot(0.5)))))
    assert fit(callback).callback.masks.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_gradients_reach_the_kept_weights_only() -> None:
    class Look(L.Callback):
        seen = 0

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            for name, mask in callback.masks.items():
                gradient = pl_module.get_parameter(name).grad
                assert not gradient[~mask].any()
                self.seen += int(not mask.all() and bool(gradient[mask].any()))

    callback, look = GradualMagnitudePruning(OneShot(0.5, at=5)), Look()
    fit(callback, look)
    assert look.seen > STEPS - 5
