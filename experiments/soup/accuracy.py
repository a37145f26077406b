"""When is a sparse model soup worth its cost? Soups beside their ingredients, and beside pruning with one network.

python experiments/run.py soup/digits      # LeNet-300-100 on scikit-learn's digits
python experiments/run.py soup/resnet20    # ResNet-20 of half the width on CIFAR-10 at 8x8
python experiments/run.py soup/full --device gpu
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evidence import Above, Found, Study, of_rounds

from sparsetrain.cli.grid import by_arm, in_points
from sparsetrain.report import SoupRound, draw_soups, markdown_table, paired, write_between

DENSE, SOUP, ONE, LONGER, EQUAL = "dense", "soup of 3", "one network", "one, 3 times longer", "dense, 3 times longer"
MEAN, BEST = "mean of its ingredients", "best ingredient on val"


class SoupStudy(Study):
    """Its ingredients are compared, too: those of the last round."""

    def networks(self, results: Mapping[str, Any]) -> Found:
        found = super().networks(results)
        if SOUP not in found:
            return found
        mean = [ingredients_of(run, lambda each: sum(test for test, _ in each) / len(each)) for run in found[SOUP]]
        best = [ingredients_of(run, lambda each: max(each, key=lambda one: one[1])[0]) for run in found[SOUP]]
        return {**found, MEAN: mean, BEST: best}

    def training_flops(self, run: Mapping[str, Any], found: Found) -> int:
        own = super().training_flops(run, found)
        if run["arm"] == DENSE:
            return own
        return own + next(one["training_flops"] for one in found[DENSE] if one["seed"] == run["seed"])

    def report(self, results: Mapping[str, Any]) -> None:
        super().report(results)
        write_between(self.folder / "README.md", f"{self.key}-rounds", rounds_table(results))

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
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


def facts(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run beside its test accuracy: the networks of each round, with batch norm recalibrated."""
    if "rounds" not in summary:
        return {}
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
    return {"rounds": of_rounds(summary), "soups": soups}


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


def ingredients_of(run: Mapping[str, Any], take: Callable[[list[tuple[float, float]]], float]) -> dict[str, Any]:
    """A record like a run's of the last round's ingredients, of whose (test, val) accuracies `take` makes one."""
    each = [(one["test_accuracy"], one["val_accuracy"]) for one in run["soups"][-1]["ingredients"]]
    return {"seed": run["seed"], "sparsity": run["sparsity"], "test_accuracy": take(each)}


def arms(dense: tuple[str, ...], length: int) -> dict[str, tuple[str, ...]]:
    """Name -> overrides.

    Args:
        dense: of the dense network, from which the others start.
        length: epochs of a round.
    """
    start = ("method=soup", "init_from={runs}/dense-{seed}/model.safetensors", "method.dense_length=0it")
    rounds = (*start, "trainer.max_epochs=-1", "method.rounds=3", "method.sparsity=0.9")
    one, short = "method.ingredients=1", f"method.round_length={length}ep"
    longer = f"method.round_length={3 * length}ep"
    return {
        DENSE: dense,
        SOUP: (*rounds, short),
        ONE: (*rounds, short, one),
        LONGER: (*rounds, longer, one),
        EQUAL: (*rounds, longer, one, "method.sparsity=0.0"),
    }


def study(name: str, title: str, recipe: tuple[str, ...], dense: tuple[str, ...], length: int) -> SoupStudy:
    """One of `STUDIES`, of rounds with so many epochs."""
    return SoupStudy(
        name=name,
        title=title,
        question="When is a sparse model soup worth its cost?",
        published="the soup beats its ingredients, and pruning that retrains as long (Zimmer et al. 2024)",
        headline="soup",
        recipe=recipe,
        arms=arms(dense, length),
        control=SOUP,
        claims=[Above(SOUP, other) for other in (MEAN, BEST, ONE, LONGER)],
        stages=[[arm] for arm in arms(dense, length)],
        facts=facts,
    )


STUDIES = (
    study("soup/digits", "LeNet-300-100, digits", ("+experiment=digits_dense",), (), length=10),
    study(
        "soup/resnet20",
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
    study(
        "soup/full", "ResNet-20, CIFAR-10", ("+experiment=resnet20_dense", "module.channels_last=true"), (), length=20
    ),
)
