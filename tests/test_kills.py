"""A smaller run of experiments/kills/kills.py, and that its comparison sees what it should."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # On the path, and not loaded from its file: the runs' processes import it by its name.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments" / "kills")
    if sys.platform != "linux":
        pytest.skip("forked runs and SIGKILL are tried on Linux only")
    import kills

    return kills


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bits_of_the_uninterrupted_one(kills: ModuleType, tmp_path: Path) -> None:
    reference = kills.uninterrupted("gradual", tmp_path, "atomic")
    for seed, moment in ((2, "any"), (3, "write")):
        kill = kills.draw("gradual", seed, "atomic", moment, step_s=0.01)
        outcome = kills.kill_and_resume("gradual", kill, reference, tmp_path)
        assert outcome is not None
        assert 0 < outcome.step_reached < kills.SUBJECTS["gradual"].steps
        assert outcome.differences == []


@pytest.mark.slow
def test_a_run_killed_as_a_round_begins_resumes_to_the_bits_of_the_uninterrupted_one(
    kills: ModuleType, tmp_path: Path
) -> None:
    reference = kills.uninterrupted("rounds", tmp_path, "atomic")
    kill = kills.draw("rounds", 4, "atomic", "pruning", step_s=0.01)
    outcome = kills.kill_and_resume("rounds", kill, reference, tmp_path)
    assert outcome is not None
    assert kill.after_step == kills.SUBJECTS["rounds"].changes[1]
    assert outcome.step_reached >= kill.after_step  # on a busy machine the signal may come late
    assert outcome.differences == []


@pytest.mark.slow
def test_a_run_killed_as_a_soup_is_formed_resumes_to_the_bits_of_the_uninterrupted_one(
    kills: ModuleType, tmp_path: Path
) -> None:
    reference = kills.uninterrupted("soup", tmp_path, "atomic")
    kill = kills.draw("soup", 6, "atomic", "recalibration", step_s=0.01)
    outcome = kills.kill_and_resume("soup", kill, reference, tmp_path)
    assert outcome is not None
    assert kill.after_step == kills.SUBJECTS["soup"].soups[0]
    assert outcome.step_reached >= kill.after_step  # as above
    assert outcome.differences == []


def test_where_a_kill_fell_at_a_change_of_rounds_is_read_from_the_journal(kills: ModuleType) -> None:
    rounds, killed = kills.SUBJECTS["rounds"], {("step", 47): {}, ("step", 48): {}}
    assert kills._change(killed, rounds) == "between"
    assert kills._change({**killed, ("pruning", 48): {}}, rounds) == "pruning"
    assert kills._change({**killed, ("pruning", 48): {}, ("begun", 48): {}}, rounds) is None
    assert kills._change({("step", 47): {}}, rounds) is None


def test_where_a_kill_fell_as_a_soup_was_formed_is_read_from_the_journal(kills: ModuleType) -> None:
    soup, killed = kills.SUBJECTS["soup"], {("step", 63): {}, ("step", 64): {}}
    assert kills._change(killed, soup) == "averaging"
    assert kills._change({**killed, ("recalibration", 64): {}}, soup) == "recalibration"
    assert kills._change({**killed, ("recalibration", 64): {}, ("soup", 64): {}}, soup) is None
    assert kills._change({("step", 48): {}}, soup) == "between"  # of ingredients


def test_a_checkpoint_saved_after_the_last_epoch_is_not_the_one_compared(kills: ModuleType, tmp_path: Path) -> None:
    (tmp_path / kills.CHECKPOINTS).mkdir()
    callbacks = {"ExactResume": {"metrics": dict.fromkeys(kills.EPOCH_MEANS, 0.5)}}
    for epoch, name in ((8, "epoch=8.ckpt"), (9, "epoch=9.ckpt"), (10, "last.ckpt")):
        path = tmp_path / kills.CHECKPOINTS / name
        torch.save({"epoch": epoch, "callbacks": callbacks}, path)
        os.utime(path, (epoch, epoch))
    torch.save({}, tmp_path / kills.FINAL)
    assert kills._end(tmp_path, epochs=10)["checkpoint"]["epoch"] == 9


def test_states_differ_by_bits_types_and_keys(kills: ModuleType) -> None:
    state = {"a": [torch.tensor([0.0, 1.0]), 3], "b": torch.tensor(float("nan"))}
    assert kills.state_differences(state, {"a": [torch.tensor([0.0, 1.0]), 3], "b": torch.tensor(float("nan"))}) == []
    other = {"a": [torch.tensor([-0.0, 1.0]), 3.0], "b": torch.tensor(float("nan"), dtype=torch.float64)}
    assert kills.state_differences(state, other) == ["/a/0", "/a/1", "/b"]
    assert kills.state_differences(state, {"a": state["a"]}) == [""]


def test_a_step_that_the_resumed_run_did_not_make_again_is_a_difference(kills: ModuleType) -> None:
    whole = {("step", step): {"loss": 1.0 / step} for step in (1, 2, 3)}
    killed = {key: whole[key] for key in list(whole)[:2]}
    resumed = {("step", 3): whole["step", 3]}
    assert kills._journal_differences(whole, killed, resumed, 2) == []
    assert kills._journal_differences(whole, killed, resumed, 1) == ["journal: step 2"]
    assert kills._journal_differences(whole, killed, {("step", 3): {"loss": 0.5}}, 2) == ["journal: step 3"]
