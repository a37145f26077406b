"""What do N:M weights cost in accuracy while the network trains? Each arm beside the dense one, paired by seed.

python experiments/nm_accuracy/nm_accuracy.py digits      # LeNet-300-100 on scikit-learn's digits
python experiments/nm_accuracy/nm_accuracy.py resnet20    # ResNet-20 on CIFAR-10 at 16x16; goes on where it was stopped
python experiments/nm_accuracy/nm_accuracy.py --report    # only the tables of results/*.json
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.cli.grid import Grid, by_arm, command_line, difference, in_points, origin, write_between
from sparsetrain.report import markdown_table, t_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = (1, 2, 3, 4, 5)
BDWP, STRAIGHT = "method=bdwp", "method=straight_through"
DENSE, BARRED = "dense", "BDWP 2:4"


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

    def grid(self, name: str) -> Grid:
        """All of its runs."""
        return Grid(name, self.recipe, self.arms, Path("runs/nm_accuracy") / name, RESULTS / f"{name}.json")


TASKS = {
    "digits": Task(
        "LeNet-300-100, digits",
        ("+experiment=digits_dense",),
        {
            DENSE: (),
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
            DENSE: (),
            BARRED: (BDWP,),
            "SR-STE 2:4": (STRAIGHT,),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "BDWP 2:8": (BDWP, "method.m=8"),
        },
        bar="lower end > -1.5",
    ),
}


def measure(name: str, workers: int) -> None:
    """Make the runs that results/NAME.json does not hold: the arm that has a bar and its control first."""
    grid = TASKS[name].grid(name)
    first, others = [*grid.arms][:2], [*grid.arms][2:]
    grid.measure([(arm, seed) for arms in (first, others) for seed in SEEDS for arm in arms], workers)


def table(results: Mapping[str, Any]) -> str:
    """Accuracy of each arm over its seeds, and its difference from dense over those that both have."""
    task, lines = TASKS[results["task"]], []
    found = by_arm(results, [*task.arms])
    for arm, runs in found.items():
        every = t_interval([one["test_accuracy"] for one in runs])
        less = ("", "") if arm == DENSE else in_points(difference(runs, found[DENSE]))
        bar = task.bar if arm == BARRED else ""
        sparsity, accuracy = f"{runs[0]['sparsity']:.1%}", f"{every.mean:.2%} +- {every.std:.2%}"
        lines.append((arm, sparsity, accuracy, len(runs), *less, bar))
    header = ("method", "sparsity", "test accuracy", "seeds", "less dense, points", "95 % interval", "bar")
    return f"{markdown_table(header, lines)}\n\n{origin(results)}"


def summary_table(*results: Mapping[str, Any]) -> str:
    """The arm that has a bar, of each task that has enough runs of it and of its control."""
    lines = []
    for one in results:
        task, found = TASKS[one["task"]], by_arm(one, [DENSE, BARRED])
        if len(found) == 2:
            less = in_points(difference(found[BARRED], found[DENSE]))
            lines.append((BARRED, task.title, len(found[BARRED]), *less, task.bar))
    header = ("method", "task", "seeds", "less dense, points", "95 % interval", "bar")
    return markdown_table(header, lines)


def report() -> None:
    """Write the table of each task that has results into this folder's README, the summary into the project's."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for one in results:
        write_between(HERE / "README.md", one["task"], table(one))
    write_between(HERE.parents[1] / "README.md", "nm", summary_table(*results))


if __name__ == "__main__":
    command_line(__doc__, TASKS, measure, report)
