"""Grids of runs: each is made once, gone on with where it was stopped, and compared by seed."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from conftest import DENSE
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sparsetrain.cli import grid as module
from sparsetrain.cli.grid import Grid, by_arm, difference, in_points, origin, write_between
from sparsetrain.models import Classifier

ALONE, FROM = "dense", "from it: 1"
ARMS = {ALONE: (), FROM: ("init_from={runs}/dense-{seed}/model.safetensors", "trainer.max_epochs=1")}
WANTED = [(arm, seed) for seed in (1, 2) for arm in ARMS]
FOLDERS = ["dense-1", "from-it-1-1", "dense-2", "from-it-1-2"]


class InProcess:
    """Stands for the pool: runs jobs here, in order, as they come back from pickling; after a death, at its end.

    Attributes:
        ran: the folders of the jobs that were begun.
    """

    ran: ClassVar[list[str]] = []

    def __init__(self, workers: int, context: Any, initializer: Callable[[], None]) -> None:
        assert context.get_start_method() == "spawn"
        pickle.dumps(initializer)
        self.waiting: list[tuple[Future[Any], bytes]] = []
        self.broken = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        job = future, pickle.dumps((function, arguments))
        if self.broken:
            self.waiting.append(job)
        else:
            self.run(*job)
        return future

    def run(self, future: Future[Any], job: bytes) -> None:
        function, (overrides, folder) = pickle.loads(job)
        self.ran.append(folder.name)
        try:
            future.set_result(function(overrides, folder))
        except BrokenProcessPool as death:
            self.broken = True
            future.set_exception(death)

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        assert cancel_futures
        assert not wait
        for future, _ in self.waiting:
            future.cancel()
            future.set_running_or_notify_cancel()
        self.waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.waiting:
            self.run(*job)


def dies_in_the_last_epoch_of_seed_2(classifier: Classifier) -> None:
    if classifier.trainer.current_epoch == 2 and classifier.trainer.default_root_dir.endswith("dense-2"):
        raise BrokenProcessPool("killed")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, list[tuple[list[str], dict[str, Any]]]]:
    """A grid, and of three calls what each ran and the results after it; in the first one a worker dies."""
    place, found = tmp_path_factory.mktemp("grid"), []
    grid = Grid("tiny", DENSE, ARMS, Path("runs"), place / "results.json", facts=lambda one: {"steps": one["steps"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(module, "ProcessPoolExecutor", InProcess)
        for number in range(3):
            InProcess.ran = []
            with pytest.MonkeyPatch.context() as of_call:
                if number == 0:
                    of_call.setattr(Classifier, "on_train_epoch_start", dies_in_the_last_epoch_of_seed_2)
                    with pytest.raises(BrokenProcessPool, match="killed"):
                        grid.measure(WANTED, 2)
                else:
                    grid.measure(WANTED, 2)
            found.append((InProcess.ran, json.loads(grid.results.read_text())))
    return replace(grid, runs=place / "runs"), found


def recorded(results: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted((one["arm"], one["seed"]) for one in results["runs"])


def test_a_run_that_dies_ends_the_call_and_what_has_ended_is_kept(calls):
    _, [(ran, results), *_] = calls
    assert ran == FOLDERS[:3]
    assert recorded(results) == sorted(WANTED[:2])


def test_a_later_call_goes_on_with_the_run_that_died_and_begins_the_others(calls):
    grid, [_, (ran, results), _] = calls
    assert ran == FOLDERS[2:]
    assert recorded(results) == sorted(WANTED)
    resumed = {name: json.loads((grid.runs / name / "summary.json").read_text())["resumed_from"] for name in FOLDERS}
    assert {name for name, path in resumed.items() if path} == {"dense-2"}
    made = torch.load(grid.runs / "dense-2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert made["global_step"] == 12


def test_nothing_is_made_twice(calls):
    _, [_, (_, before), (ran, after)] = calls
    assert ran == []
    assert after == before


def test_a_record_has_the_facts_of_the_run_and_those_asked_for(calls):
    grid, (*_, (_, results)) = calls
    assert results.keys() == {"task", "recipe", "runs"}
    assert (results["task"], results["recipe"]) == ("tiny", [*DENSE])
    for one in results["runs"]:
        folder = FOLDERS[WANTED.index((one["arm"], one["seed"]))]
        summary = json.loads((grid.runs / folder / "summary.json").read_text())
        own = ["arm", "seed", "test_accuracy", "date", "steps"]
        assert list(one) == [*own, "sparsity", "device", "versions", "git"]
        assert one["test_accuracy"] == summary["test"]["accuracy"]
        assert one["steps"] == (4 if one["arm"] == FROM else 12)


def test_overrides_name_the_seed_and_the_folder_of_all_runs(calls):
    grid, _ = calls
    for seed in (1, 2):
        cfg = OmegaConf.load(grid.runs / f"from-it-1-{seed}" / "config.yaml")
        assert cfg.init_from == str(grid.runs / f"dense-{seed}" / "model.safetensors")
        assert (cfg.seed, cfg.dataset.seed) == (seed, seed)
        start, end = (load_file(grid.runs / f"{name}-{seed}" / "model.safetensors") for name in ("dense", "from-it-1"))
        apart = [float((end[name] - start[name]).norm() / start[name].norm()) for name in ("fc1.weight", "fc2.weight")]
        assert max(apart) < 0.5  # two other initialisations are apart by 1.4


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
    runs = [record("a", 1, 0.5, "f" * 40), record("a", 2, 0.5, "f" * 40), record("a", 3, 0.5)]
    assert origin({"runs": runs}) == "CPU, 1 thread a run; a 1; 2026-01-01, commit ffffffffff, none."


def test_only_what_stands_between_the_markers_of_a_name_is_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("x\n<!-- a:begin -->\nold\n<!-- a:end -->\ny\n<!-- b:begin -->\nkept\n<!-- b:end -->\n")
    write_between(readme, "a", "new\nlines")
    assert readme.read_text() == (
        "x\n<!-- a:begin -->\nnew\nlines\n<!-- a:end -->\ny\n<!-- b:begin -->\nkept\n<!-- b:end -->\n"
    )
