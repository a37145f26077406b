"""Accuracy over the cost of training: dense networks, and ways to a tenth of the weights, all on one task."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from evidence import Study

from sparsetrain.report import Interval, markdown_table, t_interval

DENSE = "dense"
SPARSITIES = 0.89, 0.91  # rounds that prune 52.5 % of what is left end at 89.3 %


@dataclass(frozen=True)
class Point:
    """An arm of a study.

    Args:
        study: the folder's name.
        arm: its name.
        sparsity: of its weights.
        epochs: of training, counted in those of the dense network,
        flops: and their FLOPs; with those of the network that it began with.
        accuracy: on test data, over seeds.
    """

    study: str
    arm: str
    sparsity: float
    epochs: float
    flops: float
    accuracy: Interval


def points(studies: Iterable[Study], flops_of_epoch: float) -> list[Point]:
    """The dense arms of all studies, and those with about a tenth of the weights; the cheapest first."""
    found = []
    for study in studies:
        networks = study.networks(study.results)
        for arm, runs in networks.items():
            sparse = all(SPARSITIES[0] < run["sparsity"] < SPARSITIES[1] for run in runs)
            if (arm == DENSE or sparse) and all("training_flops" in run for run in runs):
                flops = max(study.training_flops(run, networks) for run in runs)
                accuracy = t_interval([run["test_accuracy"] for run in runs])
                found.append(
                    Point(study.folder.name, arm, runs[0]["sparsity"], flops / flops_of_epoch, flops, accuracy)
                )
    return sorted(found, key=lambda point: (point.flops, point.arm))


def beaten(point: Point, others: Sequence[Point]) -> bool:
    """Whether another arm with as many weights is more accurate and not more expensive."""
    rivals = [other for other in others if (other.arm == DENSE) == (point.arm == DENSE)]
    return any(other.flops <= point.flops and other.accuracy.mean > point.accuracy.mean for other in rivals)


def table(found: Sequence[Point]) -> str:
    """All arms; those that no other one beats are marked."""
    lines = [
        (
            *(f"[{point.study}]({point.study}/README.md)", point.arm, f"{1 - point.sparsity:.1%}"),
            *(f"{point.epochs:.0f}", f"{point.flops / 1e12:.2f}"),
            *(f"{point.accuracy.mean:.2%} +- {point.accuracy.std:.2%}", point.accuracy.n),
            "" if beaten(point, found) else "yes",
        )
        for point in found
    ]
    header = (
        *("study", "network", "weights left", "epochs", "training TFLOPs", "test accuracy", "seeds"),
        "best for its cost",
    )
    return markdown_table(header, lines)


def draw(path: Path, found: Sequence[Point]) -> None:
    """Accuracy over epochs, below, and FLOPs of training, above; a colour for each study, a line joins the dense."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    dense = [point for point in found if point.arm == DENSE]
    sparse = sorted((point for point in found if point.arm != DENSE), key=lambda point: point.study)
    colors = {study: f"C{number}" for number, study in enumerate(dict.fromkeys(point.study for point in sparse))}
    groups = [*([dense] if dense else []), *([point] for point in sparse)]
    beside: Counter[int] = Counter()  # how many have been drawn at a place
    for group, marker in zip(groups, cycle("osD^vPXp*<>h"), strict=False):
        shift = 1.025 ** max(beside[round(point.epochs)] for point in group)
        beside.update(round(point.epochs) for point in group)
        halves = [point.accuracy.high - point.accuracy.mean for point in group]
        axes.errorbar(
            [point.epochs * shift for point in group],
            [point.accuracy.mean for point in group],
            yerr=halves,
            color="#444444" if group is dense else colors[group[0].study],
            linestyle="--" if group is dense else "none",
            marker=marker,
            markersize=6,
            capsize=3,
            label=DENSE if group is dense else f"{group[0].study}: {group[0].arm}",
        )
    axes.set_xscale("log")
    ticks: list[int] = []
    for epochs in sorted({round(point.epochs) for point in found}):
        if not ticks or epochs > 1.1 * ticks[-1]:  # numbers would overlap
            ticks.append(epochs)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training, in epochs of the dense network (log scale)", ylabel="test accuracy")
    of_epoch = found[0].flops / found[0].epochs
    above = axes.secondary_xaxis("top")
    above.set_xticks(ticks, [f"{tick * of_epoch / 1e12:.3g}" for tick in ticks])
    above.minorticks_off()
    above.set_xlabel("training, TFLOPs")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines["right"].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, title="mean, 95 % interval", alignment="left")
    figure.savefig(path, dpi=150)
