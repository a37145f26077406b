"""What a soup gained over its ingredients, round by round: values, a table, a CSV and a picture."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from sparsetrain.report.tables import markdown_table

_SOUP, _INGREDIENT, _MEAN = "#c8442d", "#3b6ea5", "#444444"
_COLUMNS = ("round", "sparsity", "network", "distance")


@dataclass(frozen=True)
class SoupRound:
    """The networks of one round of a soup, each evaluated with batch norm recalibrated alike.

    Args:
        number: of the round, from 1.
        sparsity: of the soup and of each ingredient, in [0, 1).
        soup: metric -> value, such as "val/accuracy" and "test/accuracy".
        ingredients: the same of each ingredient, at least one.
        distance: the mean Euclidean distance between two ingredients, over all weights; None of a single one.
    """

    number: int
    sparsity: float
    soup: Mapping[str, float]
    ingredients: Sequence[Mapping[str, float]]
    distance: float | None

    def mean(self, metric: str) -> float:
        """The mean of `metric` over the ingredients."""
        return mean(ingredient[metric] for ingredient in self.ingredients)

    def best(self, metric: str, *, chosen_by: str) -> float:
        """`metric` of the ingredient whose `chosen_by`, an accuracy on validation data, is highest."""
        return max(self.ingredients, key=lambda ingredient: ingredient[chosen_by])[metric]


def soups_table(rounds: Sequence[SoupRound]) -> str:
    """A Markdown table with one line per round: test accuracy of the soup, and of its ingredients.

    The best ingredient is the one with the highest validation accuracy, and left out where there is none.
    """
    header = ("round", "sparsity", "soup", "mean of ingredients", "best on val", "ingredients", "distance")
    lines = []
    for row in rounds:
        judged = all("val/accuracy" in ingredient for ingredient in row.ingredients)
        lines.append(
            (
                row.number,
                f"{row.sparsity:.2%}",
                f"{row.soup['test/accuracy']:.2%}",
                f"{row.mean('test/accuracy'):.2%}",
                f"{row.best('test/accuracy', chosen_by='val/accuracy'):.2%}" if judged else "",
                ", ".join(f"{ingredient['test/accuracy']:.2%}" for ingredient in row.ingredients),
                "" if row.distance is None else f"{row.distance:.3g}",
            )
        )
    return markdown_table(header, lines)


def write_soups_csv(path: Path | str, rounds: Sequence[SoupRound]) -> None:
    """Write one row per network: "soup" or the number of the ingredient, from 0, and each of its metrics."""
    metrics = sorted({name for row in rounds for name in row.soup})
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, (*_COLUMNS, *metrics), restval="", lineterminator="\n")
        writer.writeheader()
        for row in rounds:
            networks = {"soup": row.soup, **{str(j): metrics for j, metrics in enumerate(row.ingredients)}}
            for name, measured in networks.items():
                facts = {"round": row.number, "sparsity": row.sparsity, "network": name}
                distance = {} if row.distance is None else {"distance": row.distance}
                writer.writerow({**facts, **distance, **measured})


def draw_soups(path: Path | str, rounds: Sequence[SoupRound], *, dense: float | None = None) -> None:
    """Draw the test accuracy of ingredients, their mean and the soup over the rounds.

    Args:
        path: the file; its suffix chooses the format (.png, .pdf, .svg).
        rounds: at least one, each with "test/accuracy".
        dense: test accuracy of the network before the first pruning, a horizontal line.

    Raises:
        ValueError: no round.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    if not rounds:
        raise ValueError("There is no round to draw.")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if dense is not None:
        axes.axhline(dense, color=_MEAN, linestyle="--", linewidth=1.2, label="dense network")
    places = [row.number for row in rounds]
    every = [(row.number, one["test/accuracy"]) for row in rounds for one in row.ingredients]
    axes.plot(*zip(*every, strict=True), "o", color=_INGREDIENT, alpha=0.6, markersize=5, label="ingredients")
    means = [row.mean("test/accuracy") for row in rounds]
    soups = [row.soup["test/accuracy"] for row in rounds]
    axes.plot(places, means, "_", color=_INGREDIENT, markersize=22, markeredgewidth=2, label="their mean")
    axes.plot(places, soups, "D-", color=_SOUP, linewidth=1.5, markersize=6, label="soup")
    axes.set(ylabel="test accuracy", xlim=(places[0] - 0.5, places[-1] + 0.5))
    axes.set_xticks(places, [f"round {row.number}\nsparsity {row.sparsity:.1%}" for row in rounds])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.spines[["right", "top"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
