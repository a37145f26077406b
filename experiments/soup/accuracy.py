"""When is a sparse model soup worth its cost? Soups beside their ingredients, and beside pruning with one network.

python experiments/soup/accuracy.py digits      # LeNet-300-100 on scikit-learn's digits
python experiments/soup/accuracy.py resnet20    # ResNet-20 of half the width on CIFAR-10 at 8x8
python experiments/soup/accuracy.py --report    # only the tables of results/*.json

Stopped, it goes on where it was.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.cli.grid import Grid, by_arm, command_line, difference, in_points, origin, write_between
from sparsetrain.report import SoupRound, draw_soups, markdown_table, paired, t_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = (1, 2, 3, 4, 5)
DENSE, SOUP, ONE, LONGER, EQUAL = "dense", "soup of 3", "one network", "one, 3 times longer", "dense, 3 times longer"
MEAN, BEST = "mean of its ingredients", "best ingredient on val"
COMPARED = (MEAN, BEST, ONE, LONGER)


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Args:
        title: what tables call it.
        recipe: Hydra overrides of every run.
        dense: of the dense network, from which the others start.
        length: epochs of a round.
    """

    title: str
    recipe: tuple[str, ...]
    dense: tuple[str, ...]
    length: int

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """Name -> overrides."""
        start = ("method=soup", "init_from={runs}/dense-{seed}/model.safetensors", "method.dense_length=0it")
        rounds = (*start, "trainer.max_epochs=-1", "method.rounds=3", "method.sparsity=0.9")
        one, short = "method.ingredients=1", f"method.round_length={self.length}ep"
        longer = f"method.round_length={3 * self.length}ep"
        return {
            DENSE: self.dense,
            SOUP: (*rounds, short),
            ONE: (*rounds, short, one),
            LONGER: (*rounds, longer, one),
            EQUAL: (*rounds, longer, one, "method.sparsity=0.0"),
        }

    def grid(self, name: str) -> Grid:
        """All of its runs."""
        return Grid(name, self.recipe, self.arms, Path("runs/soup") / name, RESULTS / f"{name}.json", facts)


TASKS = {
    "digits": Task("LeNet-300-100, digits", ("+experiment=digits_dense",), (), length=10),
    "resnet20": Task(
        "ResNet-20 of half the width, CIFAR-10 at 8x8",
        (
            "+experiment=resnet20_dense",
            "model.width=8",
            "dataset.size=8",
            "dataset.shift=1",
            "module.channels_last=true",
        ),
        ("trainer.max_epochs=30", "lr_policy.milestones=[15ep,23ep]"),
        length=5,
    ),
}


def facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: the networks of each round, with batch norm recalibrated."""
    if "rounds" not in summary:
        return {}
    of_rounds = [{"sparsity": r["sparsity"], "test_accuracy": r["test/accuracy"]} for r in summary["rounds"]]
    soups = [
        {
            "distance": soup["distance"],
            "ingredients": [
                {"test_accuracy": one["test/accuracy"], "val_accuracy": one["val/accuracy"]}
                for one in soup["ingredients"]
            ],
        }
        for soup in summary["soups"]
    ]
    return {"rounds": of_rounds, "soups": soups}


def measure(name: str, workers: int) -> None:
    """Make the runs that results/NAME.json does not hold: first the dense networks, from which the others start."""
    grid = TASKS[name].grid(name)
    grid.measure([(arm, seed) for arm in grid.arms for seed in SEEDS], min(workers, len(SEEDS)))


def table(results: Mapping[str, Any]) -> str:
    """The networks of the last round: accuracy over the seeds, and what the soup is above them."""
    found, lines = networks(results), []
    soup = found[SOUP]
    for arm in (DENSE, EQUAL, SOUP, MEAN, BEST, ONE, LONGER):
        if arm in found:
            accuracy = t_interval([run["test_accuracy"] for run in found[arm]])
            less = ("", "") if arm == SOUP else in_points(difference(soup, found[arm]))
            measured = f"{accuracy.mean:.2%} +- {accuracy.std:.2%}"
            lines.append((arm, f"{found[arm][0]['sparsity']:.1%}", measured, len(found[arm]), *less))
    header = ("network", "sparsity", "test accuracy", "seeds", "soup less this, points", "95 % interval")
    return f"{markdown_table(header, lines)}\n\n{origin(results)}"


def summary_table(*results: Mapping[str, Any]) -> str:
    """What the soups of the last round are above other networks, in points with 95 % intervals; one line per task."""
    lines = []
    for one in results:
        found = networks(one)
        against = [" ".join(in_points(difference(found[SOUP], found[arm]))) for arm in COMPARED if arm in found]
        lines.append((TASKS[one["task"]].title, len(found[SOUP]), *against, *[""] * (len(COMPARED) - len(against))))
    return markdown_table(("soup of 3 at 90 %, less ...", "seeds", *COMPARED), lines)


def rounds_table(results: Mapping[str, Any]) -> str:
    """The soup above the mean of its ingredients, round by round."""
    runs = by_arm(results, [SOUP])[SOUP]
    lines = []
    for number, first in enumerate(runs[0]["soups"]):
        gains, distances = [], []
        for run in runs:
            tested = [one["test_accuracy"] for one in run["soups"][number]["ingredients"]]
            gains.append(run["rounds"][number]["test_accuracy"] - sum(tested) / len(tested))
            distances.append(run["soups"][number]["distance"])
        sparsity = runs[0]["rounds"][number]["sparsity"]
        distance = sum(distances) / len(distances)
        lines.append(
            (number + 1, f"{sparsity:.1%}", len(first["ingredients"]), *in_points(paired(gains)), f"{distance:.3g}")
        )
    header = ("round", "sparsity", "ingredients", "soup less their mean, points", "95 % interval", "distance")
    return markdown_table(header, lines)


def networks(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of each arm, and such of the ingredients of the last round: of their mean, and of the best."""
    found = by_arm(results, [*TASKS[results["task"]].arms])
    found[MEAN] = [ingredients_of(run, lambda each: sum(test for test, _ in each) / len(each)) for run in found[SOUP]]
    found[BEST] = [ingredients_of(run, lambda each: max(each, key=lambda one: one[1])[0]) for run in found[SOUP]]
    return found


def ingredients_of(run: Mapping[str, Any], take: Callable[[list[tuple[float, float]]], float]) -> dict[str, Any]:
    """A record like a run's of the last round's ingredients, of whose (test, val) accuracies `take` makes one."""
    each = [(one["test_accuracy"], one["val_accuracy"]) for one in run["soups"][-1]["ingredients"]]
    return {"seed": run["seed"], "sparsity": run["sparsity"], "test_accuracy": take(each)}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The soups of one run, the first seed's."""
    run, dense = (min(by_arm(results, [arm])[arm], key=lambda one: one["seed"]) for arm in (SOUP, DENSE))
    rounds = [
        SoupRound(
            number,
            of_round["sparsity"],
            {"test/accuracy": of_round["test_accuracy"]},
            [{"test/accuracy": one["test_accuracy"]} for one in soup["ingredients"]],
            soup["distance"],
        )
        for number, (of_round, soup) in enumerate(zip(run["rounds"], run["soups"], strict=True), 1)
    ]
    draw_soups(path, rounds, dense=dense["test_accuracy"])


def report() -> None:
    """Write the tables of each task that has results, and draw its picture."""
    every = [json.loads(path.read_text()) for path in (RESULTS / f"{name}.json" for name in TASKS) if path.exists()]
    for results in every:
        name = results["task"]
        write_between(HERE / "README.md", name, table(results))
        write_between(HERE / "README.md", f"{name}-rounds", rounds_table(results))
        draw(results, HERE / f"{name}.png")
    write_between(HERE.parents[1] / "README.md", "soup", summary_table(*every))


if __name__ == "__main__":
    command_line(__doc__, TASKS, measure, report)
