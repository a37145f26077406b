"""Grids of runs for experiments: arms that are compared, each with several seeds; made, or gone on with."""

import argparse
import json
import logging
import multiprocessing
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsetrain.cli.artifacts import SUMMARY
from sparsetrain.cli.resume import is_complete
from sparsetrain.cli.train import compose, train
from sparsetrain.report import Interval, paired

_FACTS = ("sparsity", "device", "versions", "git")


@dataclass(frozen=True)
class Grid:
    """Runs of several arms with the same seeds, so that differences are paired.

    Args:
        name: what the results call it.
        recipe: Hydra overrides of every run; "{seed}" stands for its seed, "{runs}" for the folder of all runs.
        arms: name -> its own overrides.
        runs: a folder with one for each run.
        results: a JSON file with a record of each run that has ended; a later call adds to it.
        facts: summary of a run -> what its record holds beside its arm, seed, test accuracy and date.
    """

    name: str
    recipe: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    runs: Path
    results: Path
    facts: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda summary: {}

    def measure(self, wanted: Sequence[tuple[str, int]], workers: int) -> None:
        """Make the runs (arm, seed) that have no record yet, several at a time, each on one thread, in that order.

        If one fails, those beside it are still ended and recorded, and then its error is raised; a later call goes on
        with it and the others.

        Raises:
            ValueError: the results are of another recipe.
        """
        results: dict[str, Any] = {"task": self.name, "recipe": [*self.recipe], "runs": []}
        if self.results.exists():
            results = json.loads(self.results.read_text())
        if results["recipe"] != [*self.recipe]:
            raise ValueError(f"{self.results} is of the recipe {results['recipe']}. Remove it to begin again.")
        made = {(one["arm"], one["seed"]) for one in results["runs"]}
        failed = None
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
            pending = {pool.submit(_run, *self._job(*job)): job for job in wanted if job not in made}
            for done in as_completed(pending):
                if done.cancelled() or done.exception() is not None:
                    failed = failed or done
                    pool.shutdown(wait=False, cancel_futures=True)
                    continue
                (arm, seed), summary = pending[done], done.result()
                record = {"arm": arm, "seed": seed, "test_accuracy": summary["test"]["accuracy"]}
                of_run = {key: summary[key] for key in _FACTS}
                results["runs"].append({**record, "date": date.today().isoformat(), **self.facts(summary), **of_run})
                self.results.write_text(json.dumps(results, indent=1) + "\n")
        if failed is not None:
            failed.result()

    def _job(self, arm: str, seed: int) -> tuple[tuple[str, ...], Path]:
        overrides = [*self.recipe, *self.arms[arm], "seed={seed}"]
        filled = (one.replace("{seed}", str(seed)).replace("{runs}", str(self.runs.absolute())) for one in overrides)
        return tuple(filled), self.runs / f"{arm.replace(' ', '-').replace(':', '')}-{seed}"


def command_line(
    description: str, tasks: Collection[str], measure: Callable[[str, int], None], report: Callable[[], None]
) -> None:
    """The command line of an experiment of several tasks.

    Args:
        description: what the help says.
        tasks: their names, of which one is measured at a time.
        measure: makes the runs of a task, so many at a time.
        report: writes tables and pictures of all results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=sorted(tasks), help="what to train")
    parser.add_argument("--report", action="store_true", help="only the tables of results/*.json")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not arguments.report and arguments.task is None:
        parser.error("name a task, or --report")
    if not arguments.report:
        measure(arguments.task, arguments.workers)
    report()


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
    return f"CPU, 1 thread a run; {'; '.join(software)}; {', '.join(dates)}, commit {', '.join(commits)}."


def write_between(readme: Path, name: str, body: str) -> None:
    """Replace what stands between the markers `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = readme.read_text().partition(begin)
    readme.write_text(f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}")


def _run(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """The summary of a run, which is made, or gone on with, unless its folder holds it whole."""
    if not is_complete(folder):
        quiet = ("trainer=cpu", "trainer.enable_progress_bar=false", "resume=true")
        train(compose(*quiet, *overrides, output_dir=folder))
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    return summary


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
