import pytest
from conformance.harness import STEPS, PlainModule, SaveEverywhere, fit, loaders

from sparsetrain import Constant, Cubic, GradualMagnitudePruning, Linear, Magnitude, Movement, OneShot, Pruning


def test_masks_are_updated_when_and_to_what_the_schedule_says():
    schedule = Cubic(0.9, begin=2, end=9, every=3)
    callback = fit(GradualMagnitudePruning(schedule)).callback
    assert [update.step for update in callback.history] == [2, 5, 8, 9]
    assert [update.target for update in callback.history] == [schedule.target(step) for step in (2, 5, 8, 9)]


def test_lengths_may_be_in_epochs_and_shares_of_the_run():
    callback = fit(GradualMagnitudePruning(Linear(0.6, begin="1ep", end="0.8run", every="0.5ep"))).callback
    assert [update.step for update in callback.history] == [5, 8, 11, 12]
    assert callback.final_step() == 12


def test_a_constant_sparsity_holds_from_the_first_step():
    callback = fit(GradualMagnitudePruning(Constant(0.5))).callback
    assert [(update.step, update.target) for update in callback.history] == [(0, 0.5)]


def test_one_shot_prunes_once():
    callback = fit(GradualMagnitudePruning(OneShot(0.7, at="1ep"))).callback
    assert [(update.step, update.target) for update in callback.history] == [(5, 0.7)]


@pytest.mark.parametrize("criterion", [Magnitude(), Movement()], ids=["magnitude", "movement"])
@pytest.mark.parametrize("batches", [True, 2])
def test_fast_dev_run_prunes_to_the_final_sparsity_at_its_first_step_and_says_so(caplog, batches, criterion):
    method = GradualMagnitudePruning(Cubic(0.8, begin="1ep", end="50ep"), pruning=Pruning(criterion=criterion))
    with caplog.at_level("INFO"):
        callback = fit(method, make=PlainModule, fast_dev_run=batches).callback
    assert [(update.step, update.target) for update in callback.history] == [(0, 0.8)]
    assert "fast_dev_run: pruning to 0.8 at the first step." in caplog.text


def test_the_schedule_is_left_as_it_was_given():
    schedule = OneShot(0.8, at="1ep")
    callback = GradualMagnitudePruning(schedule)
    fit(callback)
    fit(callback, data=loaders(), max_epochs=4)
    assert callback.schedule is schedule
    assert callback.step == STEPS + 5


def test_resumed_in_a_longer_run_a_schedule_that_would_fall_back_is_refused_at_the_start(tmp_path):
    schedule = Cubic(0.8, begin="0.1run", end="0.7run", every=2)
    fit(GradualMagnitudePruning(schedule)).trainer.save_checkpoint(tmp_path / "last.ckpt")
    message = (
        r"saved with sparsity 0.8 after 15 steps.* of 30 steps, .* asks for 0\.77\d+ at step 15\..*give the schedule"
    )
    with pytest.raises(ValueError, match=message):
        fit(GradualMagnitudePruning(schedule), ckpt_path=tmp_path / "last.ckpt", max_epochs=6)
    in_steps = GradualMagnitudePruning(Cubic(0.8, begin=2, end=11, every=2))
    callback = fit(in_steps, ckpt_path=tmp_path / "last.ckpt", make=PlainModule, max_epochs=6).callback
    assert callback.step == 30
    assert callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_resumed_with_shorter_epochs_a_schedule_that_would_end_in_the_past_is_refused_at_the_start(tmp_path):
    schedule = Linear(0.8, begin="0ep", end="2ep", every=2)
    saver = SaveEverywhere(tmp_path)
    fit(GradualMagnitudePruning(schedule), saver, make=PlainModule)
    with pytest.raises(ValueError, match=r"sparsity 0.48\d* after 8 steps.* asks for 0.8 at step 6, which is over"):
        fit(
            GradualMagnitudePruning(schedule),
            ckpt_path=next(saved.path for saved in saver.saved if saved.batches == 8),
            make=PlainModule,
            limit_train_batches=3,
            max_epochs=8,
        )
