"""Grids of runs: each is made once, gone on with where it was stopped, and compared by seed."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DENSE
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sparsetrain.cli import grid as module
from sparsetrain.cli.grid import Grid, by_arm, difference, in_points, origin
from sparsetrain.models import Classifier

ALONE, FROM = "dense", "from it: 1"
ARMS = {ALONE: (), FROM: ("init_from={runs}/dense-{seed}/model.safetensors", "trainer.max_epochs=1")}
WANTED = [(arm, seed) for seed in (1, 2) for arm in ARMS]
FOLDERS = ["dense-1", "from-it-1-1", "dense-2", "from-it-1-2"]


def fails_in_the_last_epoch_of_seed_2(classifier: Classifier) -> None:
    if classifier.trainer.current_epoch == 2 and classifier.trainer.default_root_dir.endswith("dense-2"):
        raise RuntimeError("this run fails")


def waits_in_the_last_epoch_of_seed_2(classifier: Classifier) -> None:
    if classifier.trainer.current_epoch == 2 and classifier.trainer.default_root_dir.endswith("dense-2"):
        while not classifier.trainer.received_sigterm:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, list[dict[str, Any]]]:
    """A grid, and the results after each of four calls: in the first a run fails, in the second one has no end."""
    place, found = tmp_path_factory.mktemp("grid"), []
    grid = Grid(
        "tiny", DENSE, ARMS, Path("runs"), place / "results.json", facts=lambda one, folder: {"steps": one["steps"]}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(module, "_CONTEXT", multiprocessing.get_context("fork"))
        for patched in (fails_in_the_last_epoch_of_seed_2, waits_in_the_last_epoch_of_seed_2, None, None):
            with pytest.MonkeyPatch.context() as of_call:
                if patched is not None:
                    of_call.setattr(Classifier, "on_train_epoch_start", patched)
                if patched is fails_in_the_last_epoch_of_seed_2:
                    with pytest.raises(RuntimeError, match=r"dense-2 ended with exit status 1; its error is above"):
                        grid.measure(WANTED, 1)
                elif patched is waits_in_the_last_epoch_of_seed_2:
                    assert not grid.measure(WANTED, 1, minutes=0.1)
                else:
                    assert grid.measure(WANTED, 1)
            found.append(json.loads(grid.results.read_text()))
    return replace(grid, runs=place / "runs"), found


def recorded(results: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted((one["arm"], one["seed"]) for one in results["runs"])


def test_a_run_that_fails_ends_the_call_and_what_has_ended_is_kept(calls):
    _, [results, *_] = calls
    assert recorded(results) == sorted(WANTED[:2])


def test_when_the_time_is_over_nothing_is_begun_and_a_run_in_the_middle_is_no_result(calls):
    _, [first, second, *_] = calls
    assert second == first


def test_a_later_call_goes_on_with_the_run_that_was_stopped_and_begins_the_others(calls):
    grid, [_, _, results, _] = calls
    assert recorded(results) == sorted(WANTED)
    resumed = {name: json.loads((grid.runs / name / "summary.json").read_text())["resumed_from"] for name in FOLDERS}
    assert {name for name, path in resumed.items() if path} == {"dense-2"}
    made = torch.load(grid.runs / "dense-2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert made["global_step"] == 12


def test_nothing_is_made_twice(calls):
    _, [*_, before, after] = calls
    assert after == before


def test_runs_are_made_side_by_side(tmp_path, monkeypatch):
    def waits_for_the_other(classifier: Classifier) -> None:
        (tmp_path / Path(classifier.trainer.default_root_dir).name).touch()
        while len([*tmp_path.glob("dense-*")]) < 2:
            time.sleep(0.01)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(Classifier, "on_train_start", waits_for_the_other)
    grid = Grid("tiny", DENSE, ARMS, Path("runs"), tmp_path / "new" / "results.json")
    assert grid.measure([(ALONE, 1), (ALONE, 2)], 2)
    assert recorded(json.loads(grid.results.read_text())) == [(ALONE, 1), (ALONE, 2)]


def test_a_record_has_the_facts_of_the_run_and_those_asked_for(calls):
    grid, [*_, results] = calls
    assert results.keys() == {"task", "recipe", "runs"}
    assert (results["task"], results["recipe"]) == ("tiny", [*DENSE])
    for one in results["runs"]:
        folder = FOLDERS[WANTED.index((one["arm"], one["seed"]))]
        summary = json.loads((grid.runs / folder / "summary.json").read_text())
        own = ["arm", "seed", "test_accuracy", "date", "steps"]
        assert list(one) == [*own, "sparsity", "training_flops", "device", "versions", "git"]
        assert one["test_accuracy"] == summary["test"]["accuracy"]
        assert one["steps"] == (4 if one["arm"] == FROM else 12)


def test_overrides_name_the_seed_and_the_folder_of_all_runs(calls):
    grid, _ = calls
    for seed in (1, 2):
        cfg = OmegaConf.load(grid.runs / f"from-it-1-{seed}" / "config.yaml")
        assert cfg.init_from == f"runs/dense-{seed}/model.safetensors"
        assert (cfg.seed, cfg.dataset.seed) == (seed, seed)
        start, end = (load_file(grid.runs / f"{name}-{seed}" / "model.safetensors") for name in ("dense", "from-it-1"))
        apart = [float((end[name] - start[name]).norm() / start[name].norm()) for name in ("fc1.weight", "fc2.weight")]
        assert max(apart) < 0.5  # two other initialisations are apart by 1.4


def test_no_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"workers=0 make no run; give at least 1"):
        Grid("tiny", DENSE, ARMS, tmp_path, tmp_path / "results.json").measure(WANTED, 0)


def test_results_of_another_recipe_are_refused(calls):
    grid, _ = calls
    with pytest.raises(ValueError, match=r"results\.json is of the recipe .*max_epochs=3.* Remove it to begin again\."):
        replace(grid, recipe=(*DENSE, "lr_policy.warmup=1it")).measure(WANTED, 2)


def record(arm: str, seed: int, accuracy: float, commit: str | None = None) -> dict[str, Any]:
    git = None if commit is None else {"commit": commit}
    return {
        "arm": arm,
        "seed": seed,
        "test_accuracy": accuracy,
        "date": "2026-01-01",
        "versions": {"a": "1"},
        "git": git,
    }


def test_arms_are_compared_over_the_seeds_that_both_have():
    runs = [record("b", 3, 0.9), record("b", 1, 0.5), record("b", 2, 0.8), record("c", 1, 0.1)]
    runs += [record("a", seed, accuracy) for seed, accuracy in ((4, 0.1), (2, 0.7), (3, 0.6))]
    found = by_arm({"runs": runs}, ["a", "b", "c"])
    assert {arm: len(of_arm) for arm, of_arm in found.items()} == {"a": 3, "b": 3}
    assert difference(found["b"], found["a"]).mean == pytest.approx((0.1 + 0.3) / 2)
    # Student's quantile at 97.5 % with one degree of freedom is 12.706; the standard error 0.1.
    assert in_points(difference(found["b"], found["a"])) == ("+20.00", "[-107.06, +147.06]")


def test_the_origin_names_each_commit_and_version_once():
    cpu, gpu = {"type": "cpu", "name": "x", "threads": 1}, {"type": "cuda", "name": "y", "threads": 1}
    runs = [record("a", 1, 0.5, "f" * 40), record("a", 2, 0.5, "f" * 40), record("a", 3, 0.5)]
    runs = [run | {"device": device} for run, device in zip(runs, (cpu, cpu, gpu), strict=True)]
    assert origin({"runs": runs}) == "x, 1 thread a run; y; a 1; 2026-01-01, commit ffffffffff, none."
