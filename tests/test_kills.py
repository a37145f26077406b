"""A smaller run of experiments/kills/kills.py, and that its comparison sees what it should."""

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
    reference = kills.uninterrupted(tmp_path, "atomic")
    for seed, in_write in ((2, False), (3, True)):
        kill = kills.draw(seed, "atomic", in_write=in_write, step_s=0.01)
        outcome = kills.kill_and_resume(kill, reference, tmp_path)
        assert outcome is not None
        assert 0 < outcome.step_reached < kills.STEPS
        assert outcome.differences == []


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
