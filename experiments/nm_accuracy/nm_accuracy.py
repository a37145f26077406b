"""What do N:M weights cost in accuracy while the network trains? Each arm beside the dense one, paired by seed.

python experiments/nm_accuracy/nm_accuracy.py digits      # LeNet-300-100 on scikit-learn's digits
python experiments/nm_accuracy/nm_accuracy.py resnet20    # ResNet-20 on CIFAR-10 at 16x16; goes on where it stopped
python experiments/nm_accuracy/nm_accuracy.py --report    # only the tables of results/*.json
"""

import argparse
import json
import logging
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsetrain.cli.artifacts import git_state
from sparsetrain.cli.train import compose, train
from sparsetrain.report import markdown_table, paired, t_interval

HERE = Path(__file__).parent
RUNS = Path("runs/nm_accuracy")
SEEDS = (1, 2, 3, 4, 5)
BDWP, STRAIGHT = "method=bdwp", "method=straight_through"


@dataclass(frozen=True)
class Task:
    """A network, its data and recipe, and the arms trained so.

    Args:
        recipe: Hydra overrides of every arm.
        arms: name -> its own overrides, those that matter most first.
        bar: that the lower end of BDWP 2:4's interval has to pass, in points.
    """

    recipe: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    bar: float


TASKS = {
    "digits": Task(
        ("+experiment=digits_dense",),
        {
            "dense": (),
            "BDWP 2:4": (BDWP,),
            "BDWP 1:4": (BDWP, "method.n=1"),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "SR-STE 2:4": (STRAIGHT,),
            "SR-STE 1:4": (STRAIGHT, "method.n=1"),
            "transposable 2:4": (STRAIGHT, "method.transposable=true", "method.decay=0.0"),
        },
        bar=-1.0,
    ),
    "resnet20": Task(
        (
            "+experiment=resnet20_dense",
            "dataset.size=16",
            "dataset.shift=2",
            "trainer.max_epochs=30",
            "lr_policy.milestones=[15ep,23ep]",
            "trainer.precision=bf16-mixed",
            "module.channels_last=true",
        ),
        {
            "dense": (),
            "BDWP 2:4": (BDWP,),
            "SR-STE 2:4": (STRAIGHT,),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "BDWP 2:8": (BDWP, "method.m=8"),
        },
        bar=-1.5,
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


def measure(name: str, workers: int) -> Iterator[dict[str, Any]]:
    """Results of all runs that have ended, after each one; several at a time, a pair with its dense control first."""
    arms = TASKS[name].arms
    jobs = [(arm, seed) for pair in ([*arms][:2], [*arms][2:]) for seed in SEEDS for arm in pair]
    summaries: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        pending = {pool.submit(run, name, *job): job for job in jobs}
        for done in as_completed(pending):
            summaries[pending[done]] = done.result()
            facts = done.result()
            yield {
                "task": name,
                "date": date.today().isoformat(),
                "git": git_state(),
                "versions": facts["versions"],
                "device": facts["device"],
                "recipe": TASKS[name].recipe,
                "sparsity": {arm: found["sparsity"] for (arm, _), found in summaries.items()},
                "test_accuracy": {
                    arm: {seed: summaries[arm, seed]["test"]["accuracy"] for seed in SEEDS if (arm, seed) in summaries}
                    for arm in arms
                },
            }


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def table(results: Mapping[str, Any]) -> str:
    """Accuracy of each arm over its seeds, and its difference from dense over those that both have."""
    accuracy, lines = results["test_accuracy"], []
    for arm, values in accuracy.items():
        if len(values) < 2:
            continue
        every = t_interval(list(values.values()))
        row = [arm, f"{results['sparsity'][arm]:.1%}", f"{every.mean:.2%} +- {every.std:.2%}", len(values), "", "", ""]
        shared = [seed for seed in values if seed in accuracy["dense"]]
        if arm != "dense" and len(shared) > 1:
            found = paired([values[seed] - accuracy["dense"][seed] for seed in shared])
            row[4:6] = [f"{100 * found.mean:+.2f}", f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"]
        if arm == "BDWP 2:4":
            row[6] = f"> {TASKS[results['task']].bar}"
        lines.append(tuple(row))
    header = ("method", "sparsity", "test accuracy", "seeds", "less dense, points", "95 % interval", "bar")
    return markdown_table(header, lines)


def report() -> None:
    """Write the table of each task that has results into the README."""
    readme = HERE / "README.md"
    for name in TASKS:
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            results, text = json.loads(path.read_text()), readme.read_text()
            begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            before, _, rest = text.partition(begin)
            body = f"{begin}\n{table(results)}\n\n{_facts(results)}\n{end}"
            readme.write_text(f"{before}{body}{rest.partition(end)[2]}")


def _facts(results: Mapping[str, Any]) -> str:
    commit = results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"CPU, 1 thread a run; {software}; {results['date']}, commit {commit}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=sorted(TASKS), help="what to train; both have their results")
    parser.add_argument("--report", action="store_true", help="only the tables of results/*.json")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if not arguments.report and arguments.task is None:
        parser.error("name a task, or --report")
    if not arguments.report:
        for results in measure(arguments.task, arguments.workers):
            (HERE / "results" / f"{arguments.task}.json").write_text(json.dumps(results, indent=1) + "\n")
    report()


if __name__ == "__main__":
    main()
