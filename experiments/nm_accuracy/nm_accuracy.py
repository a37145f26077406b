"""What do N:M weights cost in accuracy while the network trains? Each arm beside the dense one, paired by seed.

python experiments/nm_accuracy/nm_accuracy.py digits      # LeNet-300-100 on scikit-learn's digits
python experiments/nm_accuracy/nm_accuracy.py resnet20    # ResNet-20 on CIFAR-10 at 16x16; goes on where it was stopped
python experiments/nm_accuracy/nm_accuracy.py --report    # only the tables of results/*.json
"""

import argparse
import json
import logging
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsetrain.cli.train import compose, train
from sparsetrain.report import markdown_table, paired, t_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = Path("runs/nm_accuracy")
SEEDS = (1, 2, 3, 4, 5)
BDWP, STRAIGHT = "method=bdwp", "method=straight_through"
BARRED = "BDWP 2:4"


@dataclass(frozen=True)
class Task:
    """A network, its data and recipe, and the arms trained so.

    Args:
        title: what tables call it.
        recipe: Hydra overrides of every arm.
        arms: name -> its own overrides, those that matter most first.
        bar: of the difference of `BARRED` from dense, in points.
    """

    title: str
    recipe: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    bar: str


TASKS = {
    "digits": Task(
        "LeNet-300-100, digits",
        ("+experiment=digits_dense",),
        {
            "dense": (),
            BARRED: (BDWP,),
            "BDWP 1:4": (BDWP, "method.n=1"),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "SR-STE 2:4": (STRAIGHT,),
            "SR-STE 1:4": (STRAIGHT, "method.n=1"),
            "transposable 2:4": (STRAIGHT, "method.transposable=true", "method.decay=0.0"),
        },
        bar="mean > -1.0",
    ),
    "resnet20": Task(
        "ResNet-20, CIFAR-10 at 16x16, 30 epochs",
        (
            "+experiment=resnet20_dense",
            "dataset.size=16",
            "dataset.shift=2",
            "trainer.max_epochs=30",
            "lr_policy.milestones=[15ep,23ep]",
            "module.channels_last=true",
        ),
        {
            "dense": (),
            BARRED: (BDWP,),
            "SR-STE 2:4": (STRAIGHT,),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "BDWP 2:8": (BDWP, "method.m=8"),
        },
        bar="lower end > -1.5",
    ),
}


def run(name: str, arm: str, seed: int) -> dict[str, Any]:
    """The summary of a run, which is made, or gone on with, unless its folder holds it whole."""
    task, folder = TASKS[name], RUNS / name / f"{arm.replace(' ', '-').replace(':', '')}-{seed}"
    path, last = folder / "summary.json", folder / "checkpoints" / "last.ckpt"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "wall_time_s" not in summary:
        quiet = ("trainer=cpu", "trainer.enable_progress_bar=false", f"seed={seed}")
        resumed = (f"ckpt_path={last}",) if last.exists() else ()
        train(compose(*quiet, *task.recipe, *task.arms[arm], *resumed, output_dir=folder))
        summary = json.loads(path.read_text())
    return summary


def measure(name: str, workers: int) -> None:
    """Make the runs that results/NAME.json does not hold, several at a time, and write it after each."""
    task, path = TASKS[name], RESULTS / f"{name}.json"
    results: dict[str, Any] = {"task": name, "recipe": [*task.recipe], "runs": []}
    if path.exists():
        results = json.loads(path.read_text())
    if results["recipe"] != [*task.recipe]:
        raise SystemExit(f"{path} is of another recipe: {results['recipe']}. Remove it to begin again.")
    made = {(one["arm"], one["seed"]) for one in results["runs"]}
    first, others = [*task.arms][:2], [*task.arms][2:]
    wanted = [(arm, seed) for arms in (first, others) for seed in SEEDS for arm in arms]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        pending = {pool.submit(run, name, *job): job for job in wanted if job not in made}
        for done in as_completed(pending):
            (arm, seed), summary = pending[done], done.result()
            facts = {key: summary[key] for key in ("sparsity", "device", "versions", "git")}
            accuracy = {"test_accuracy": summary["test"]["accuracy"]}
            results["runs"].append({"arm": arm, "seed": seed} | accuracy | {"date": date.today().isoformat()} | facts)
            path.write_text(json.dumps(results, indent=1) + "\n")


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def table(results: Mapping[str, Any]) -> str:
    """Accuracy of each arm over its seeds, and its difference from dense over those that both have."""
    lines = []
    for arm, runs in _by_arm(results).items():
        every = t_interval([one["test_accuracy"] for one in runs])
        difference = _difference(results, arm) if arm != "dense" else ("", "")
        bar = TASKS[results["task"]].bar if arm == BARRED else ""
        sparsity, accuracy = f"{runs[0]['sparsity']:.1%}", f"{every.mean:.2%} +- {every.std:.2%}"
        lines.append((arm, sparsity, accuracy, len(runs), *difference, bar))
    header = ("method", "sparsity", "test accuracy", "seeds", "less dense, points", "95 % interval", "bar")
    return f"{markdown_table(header, lines)}\n\n{_facts(results)}"


def summary_table(*results: Mapping[str, Any]) -> str:
    """The arms that have a bar."""
    lines = []
    for one in results:
        task, runs = TASKS[one["task"]], _by_arm(one)[BARRED]
        lines.append((BARRED, task.title, len(runs), *_difference(one, BARRED), task.bar))
    header = ("method", "task", "seeds", "less dense, points", "95 % interval", "bar")
    return markdown_table(header, lines)


def _difference(results: Mapping[str, Any], arm: str) -> tuple[str, str]:
    """Mean difference from dense over the seeds that both have, in points, and its interval."""
    values, dense = ({one["seed"]: one["test_accuracy"] for one in _by_arm(results)[name]} for name in (arm, "dense"))
    found = paired([values[seed] - dense[seed] for seed in sorted(values.keys() & dense.keys())])
    return f"{100 * found.mean:+.2f}", f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _by_arm(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm of which two or more have ended."""
    arms = TASKS[results["task"]].arms
    by_arm = {arm: [one for one in results["runs"] if one["arm"] == arm] for arm in arms}
    return {arm: runs for arm, runs in by_arm.items() if len(runs) > 1}


def _facts(results: Mapping[str, Any]) -> str:
    runs = results["runs"]
    commits = sorted({one["git"]["commit"][:10] if one["git"] else "none" for one in runs})
    dates = sorted({one["date"] for one in runs})
    software = sorted({", ".join(f"{name} {version}" for name, version in one["versions"].items()) for one in runs})
    return f"CPU, 1 thread a run; {'; '.join(software)}; {', '.join(dates)}, commit {', '.join(commits)}."


def report() -> None:
    """Write the table of each task that has results into this folder's README, the summary into the project's."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for one in results:
        _write(HERE / "README.md", one["task"], table(one))
    _write(HERE.parents[1] / "README.md", "nm", summary_table(*results))


def _write(readme: Path, name: str, body: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = readme.read_text().partition(begin)
    readme.write_text(f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=sorted(TASKS), help="what to train; both have their results")
    parser.add_argument("--report", action="store_true", help="only the tables of results/*.json")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not arguments.report and arguments.task is None:
        parser.error("name a task, or --report")
    if not arguments.report:
        measure(arguments.task, arguments.workers)
    report()


if __name__ == "__main__":
    main()
