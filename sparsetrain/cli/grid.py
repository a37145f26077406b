"""Grids of runs for experiments: arms that are compared, each with several seeds; made, or gone on with."""

import json
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from sparsetrain.cli.artifacts import read_summary, write_json
from sparsetrain.cli.resume import is_complete
from sparsetrain.cli.train import compose, train
from sparsetrain.report import Interval, paired

_CONTEXT = multiprocessing.get_context("spawn")  # a fork after CUDA or OpenMP have begun may hang
_FACTS = ("sparsity", "training_flops", "device", "versions", "git")
_PATIENCE = 120.0  # seconds that a run which is told to end has for its checkpoint


@dataclass(frozen=True)
class Grid:
    """Runs of several arms with the same seeds, so that differences are paired.

    Args:
        name: what the results call it.
        recipe: Hydra overrides of every run; "{seed}" stands for its seed, "{runs}" for the folder of all runs.
        arms: name -> its own overrides.
        runs: a folder with one for each run.
        results: a JSON file with a record of each run that has ended; a later call adds to it.
        facts: summary of a run, and its folder -> what its record holds beside its arm, seed, test accuracy and date.
    """

    name: str
    recipe: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    runs: Path
    results: Path
    facts: Callable[[Mapping[str, Any], Path], Mapping[str, Any]] = lambda summary, folder: {}

    def measure(
        self,
        wanted: Sequence[tuple[str, int]],
        workers: int,
        *,
        minutes: float = math.inf,
        device: Literal["cpu", "gpu"] = "cpu",
    ) -> bool:
        """Make the runs (arm, seed) that have no record yet, several at a time, in that order.

        Each is a process of its own, with one thread. If one fails, no other is begun; those beside it are still ended
        and recorded. When the time is over, or this process is interrupted, the runs save checkpoints and end; a later
        call goes on with them.

        Args:
            wanted: the runs.
            workers: how many at a time, at least 1; on a GPU they share it.
            minutes: how long this may take, beside the checkpoints that are saved in the end.
            device: of all runs; `conf/trainer` says how each is used.

        Returns:
            Whether all runs have ended.

        Raises:
            ValueError: the results are of another recipe, or no worker.
            RuntimeError: a run has failed; its error was printed.
        """
        if workers < 1:
            raise ValueError(f"workers={workers} make no run; give at least 1.")
        results: dict[str, Any] = {"task": self.name, "recipe": [*self.recipe], "runs": []}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        if self.results.exists():
            results = json.loads(self.results.read_text())
        if results["recipe"] != [*self.recipe]:
            raise ValueError(f"{self.results} is of the recipe {results['recipe']}. Remove it to begin again.")
        made = {(one["arm"], one["seed"]) for one in results["runs"]}
        waiting = [job for job in wanted if job not in made]
        running: dict[BaseProcess, tuple[str, int]] = {}
        end, failed = time.monotonic() + 60 * minutes, ""
        try:
            while running or (waiting and not failed and time.monotonic() < end):
                while waiting and not failed and len(running) < workers:
                    process = _CONTEXT.Process(target=_run, args=(*self.job(*waiting[0]), device))
                    process.start()
                    running[process] = waiting.pop(0)
                left = end - time.monotonic()
                wait([process.sentinel for process in running], None if left == math.inf else max(0.0, left))
                if time.monotonic() >= end:
                    break
                for ended in [each for each in running if not each.is_alive()]:
                    job = running.pop(ended)
                    if not self._record(job, results):
                        failed = failed or f"{self.job(*job)[1]} ended with exit status {ended.exitcode}"
        finally:
            _end(running)
        unfinished = [job for job in running.values() if not self._record(job, results)]
        if failed:
            raise RuntimeError(f"{failed}; its error is above. A later call goes on with it and those after it.")
        return not waiting and not unfinished

    def _record(self, job: tuple[str, int], results: dict[str, Any]) -> bool:
        """Add a run to the results, and write them, if its folder holds it whole."""
        (arm, seed), folder = job, self.job(*job)[1]
        if not is_complete(folder):
            return False
        summary = read_summary(folder)
        record = {"arm": arm, "seed": seed, "test_accuracy": summary["test"]["accuracy"]}
        of_run = {key: summary[key] for key in _FACTS}
        results["runs"].append({**record, "date": date.today().isoformat(), **self.facts(summary, folder), **of_run})
        write_json(self.results, results)
        return True

    def job(self, arm: str, seed: int) -> tuple[tuple[str, ...], Path]:
        """The overrides of a run, and its folder."""
        overrides = [*self.recipe, *self.arms[arm], "seed={seed}"]
        filled = (one.replace("{seed}", str(seed)).replace("{runs}", str(self.runs)) for one in overrides)
        return tuple(filled), self.runs / f"{arm.replace(' ', '-').replace(':', '')}-{seed}"


def by_arm(results: Mapping[str, Any], arms: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The records of each arm of which two or more have ended."""
    found = {arm: [one for one in results["runs"] if one["arm"] == arm] for arm in arms}
    return {arm: runs for arm, runs in found.items() if len(runs) > 1}


def difference(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Interval:
    """Mean difference of test accuracy over the seeds that both have, with its 95 % interval."""
    values, controls = ({one["seed"]: one["test_accuracy"] for one in each} for each in (runs, others))
    return paired([values[seed] - controls[seed] for seed in sorted(values.keys() & controls.keys())])


def in_points(interval: Interval) -> tuple[str, str]:
    """A difference of accuracies and its 95 % interval, in percentage points, as tables write them."""
    return f"{100 * interval.mean:+.2f}", f"[{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def origin(results: Mapping[str, Any]) -> str:
    """With what, when and at which commits the runs were made."""
    runs = results["runs"]
    commits = sorted({one["git"]["commit"][:10] if one["git"] else "none" for one in runs})
    dates = sorted({one["date"] for one in runs})
    software = sorted({", ".join(f"{name} {version}" for name, version in one["versions"].items()) for one in runs})
    devices = sorted({_device(one["device"]) for one in runs})
    return f"{'; '.join((*devices, *software))}; {', '.join(dates)}, commit {', '.join(commits)}."


def _device(device: Mapping[str, Any]) -> str:
    name, threads = device["name"], device["threads"]
    return f"{name}, {threads} thread{'s' * (threads > 1)} a run" if device["type"] == "cpu" else str(name)


def _run(overrides: Sequence[str], folder: Path, device: str) -> None:
    """Make a run, or go on with it, unless its folder holds it whole."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not is_complete(folder):
        quiet = (f"trainer={device}", "trainer.enable_progress_bar=false", "resume=true")
        train(compose(*quiet, *overrides, output_dir=folder))


def _end(running: Collection[BaseProcess]) -> None:
    """Tell runs to save a checkpoint and end."""
    for process in running:
        process.terminate()
    for process in running:
        process.join(_PATIENCE)
        process.kill()
        process.join()
