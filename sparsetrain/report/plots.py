"""Pictures: what a run made sparse, and how much accuracy is left at which sparsity."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from sparsetrain.masks import Update
from sparsetrain.report.statistics import t_interval
from sparsetrain.schedules import check_sparsity
from sparsetrain.selection import PlanRow

Points = Sequence[tuple[float, Sequence[float]]]  # (sparsity, accuracies over seeds)

_TARGET, _ACTUAL, _BAR = "#444444", "#c8442d", "#3b6ea5"
_COLORS = (_BAR, _ACTUAL, "#3f8f5a", "#8a5aa8", "#d08a1d", "#2fa3b5", "#b0588c", "#7d6a2f")
_MARKERS = "osD^vPXp"
_MANTISSAS = (  # of the ticks, from many to few
    tuple(half / 2 for half in range(2, 20)),
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)


def draw_sparsity(
    path: Path | str, *, plan: Sequence[PlanRow], history: Sequence[Update], target: Sequence[tuple[int, float]]
) -> None:
    """Draw sparsity over the steps (left) and the final sparsity of each pruned tensor, in network order (right).

    Args:
        path: the file; its suffix chooses the format (.png, .pdf, .svg). Its folder is made.
        plan: one row per parameter of the module.
        history: the mask updates, in order. May be empty: then nothing has been pruned.
        target: (optimizer step, target sparsity) points, in order of steps; each holds until the next.

    Raises:
        ValueError: the plan prunes nothing.
    """
    # The object interface: pyplot would keep every figure and choose a backend for the whole process.
    from matplotlib.figure import Figure

    sizes = {row.name: math.prod(row.shape) for row in plan if row.pruned}
    if not sizes:
        raise ValueError("The plan prunes no tensor, so there is no sparsity to draw.")
    total = sum(sizes.values())
    kept = history[-1].kept if history else sizes
    layers = [1 - kept[name] / size for name, size in sizes.items()]
    overall = 1 - sum(kept[name] for name in sizes) / total

    few = len(sizes) <= 16
    row_inches, font = (0.2, 9) if few else (0.135, 6.5)
    figure = Figure(figsize=(12, max(4.0, 1.3 + row_inches * len(sizes))), layout="constrained")
    over_time, per_layer = figure.subplots(1, 2)
    if not few:
        over_time.set_box_aspect(0.9)  # the right panel grows with the network, the left one stays legible
        over_time.set_anchor("N")

    actual = [(update.step, 1 - sum(update.kept[name] for name in sizes) / total) for update in history]
    end = max([1, *(step for step, _ in [*actual, *target])])
    for points, look in (
        (target, {"label": "target", "color": _TARGET, "linestyle": "--", "linewidth": 1.2, "zorder": 3}),
        (actual, {"label": "actual", "color": _ACTUAL, "linewidth": 1.8}),
    ):
        if points:
            held = [(0, 0.0), *points, (end, points[-1][1])]  # until the next update, and dense before the first
            over_time.plot(*zip(*held, strict=True), drawstyle="steps-post", **look)
    over_time.set_title(f"Sparsity of the {total:,} maskable weights: {overall:.2%} at the end", fontsize=11)
    over_time.set(xlabel="optimizer step", ylabel="sparsity", xlim=(0, end), ylim=(0, 1))
    over_time.grid(alpha=0.3, linewidth=0.6)
    if target or history:
        over_time.legend(loc="lower right", frameon=False)

    prefix, suffix, labels = _short_names(list(sizes))
    rows = range(len(layers))
    per_layer.barh(rows, layers, height=0.72, color=_BAR)
    for row, sparsity in enumerate(layers):
        per_layer.text(1.14, row, f"{sparsity:.2%}", ha="right", va="center", fontsize=font)
    per_layer.axvline(overall, color=_ACTUAL, linewidth=1.2)
    per_layer.set_yticks(rows, labels, fontsize=font)
    per_layer.set_title(f"Final sparsity of each {prefix}*{suffix} (line: all together)", fontsize=11)
    per_layer.set(xlabel="sparsity", xlim=(0, 1.15), ylim=(len(layers) - 0.4, -0.6), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    per_layer.tick_params(axis="y", length=0)
    per_layer.spines[["top", "right"]].set_visible(False)
    over_time.spines[["top", "right"]].set_visible(False)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_accuracy(
    path: Path | str,
    curves: Mapping[str, Points],
    *,
    dense: Sequence[float],
    controls: Mapping[str, Points] | None = None,
    published: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ylabel: str = "test accuracy",
    xlabels: tuple[str, str] = ("density: weights kept", "sparsity"),
) -> None:
    """Draw accuracy against the share of kept weights: on a log scale, 100 % at the left, ever sparser to the right.

    Each curve is the mean over seeds with the band of its 95 % interval, by `t_interval`; one seed gives the line
    alone, one point a marker with an error bar. The vertical axis shows every accuracy, but not all of an interval that
    reaches far beyond them: that of 2 seeds is 13 times as wide as they are apart.

    Args:
        path: the file; its suffix chooses the format (.png, .pdf, .svg). Its folder is made.
        curves: label -> (sparsity in [0, 1), accuracies over seeds in [0, 1]) points, in any order; up to 8 labels,
            controls included, have colours of their own.
        dense: accuracies over seeds of the dense network to compare with, a horizontal line; () leaves it out.
        controls: further curves, dotted and with hollow markers: random masks, fresh weights.
        published: label of a curve -> (sparsity in [0, 1), accuracy in [0, 1]) points of others: crosses in its colour.
        ylabel: what the accuracies are.
        xlabels: what is left, below, and what is gone, above: of FLOPs, say, where these are in the place of weights.

    Raises:
        ValueError: no curve, a curve or point without values, an accuracy that is not finite or outside [0, 1], a
            sparsity outside [0, 1), published points of a curve that is not drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    controls, published = controls or {}, published or {}
    if not curves:
        raise ValueError("There is no curve to draw. Give at least one label with its points.")
    everything = [*curves.items(), *controls.items()]
    for name, points in everything:
        _check_points(name, points)
    _check_accuracies("the dense control", dense)
    of_others = {name: [(sparsity, [accuracy]) for sparsity, accuracy in each] for name, each in published.items()}
    for name, points in of_others.items():
        if name not in curves:
            raise ValueError(f"{name!r} has published points and no curve. Draw its curve, or leave them out.")
        _check_points(name, points)
    groups = [accuracies for _, points in everything for _, accuracies in points] + ([dense] if dense else [])
    alike = len(set(map(len, groups))) == 1

    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    if dense:
        mean, half = _mean_and_half(dense)
        axes.axhspan(mean - half, mean + half, color=_TARGET, alpha=0.12, linewidth=0)
        axes.axhline(
            mean,
            color=_TARGET,
            linestyle="--",
            linewidth=1.4,
            label="dense control" if alike else f"dense control ({_seeds([dense])})",
        )
    for index, (name, points) in enumerate(everything):
        points = sorted(points, key=lambda point: point[0])
        density = [100 * (1 - sparsity) for sparsity, _ in points]
        means, halves = zip(*(_mean_and_half(accuracies) for _, accuracies in points), strict=True)
        color, control, alone = _COLORS[index % len(_COLORS)], index >= len(curves), len(points) == 1
        axes.errorbar(
            density,
            means,
            yerr=halves if alone and not math.isnan(halves[0]) else None,
            color=color,
            linestyle="none" if alone else ":" if control else "-",
            linewidth=1.6,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            markerfacecolor="white" if control else color,
            capsize=3,
            label=name if alike else f"{name} ({_seeds([accuracies for _, accuracies in points])})",
        )
        if not alone:
            low, high = ([m + sign * half for m, half in zip(means, halves, strict=True)] for sign in (-1, 1))
            axes.fill_between(density, low, high, color=color, alpha=0.13, linewidth=0)
        if name in of_others:
            crosses = [(100 * (1 - sparsity), accuracy) for sparsity, (accuracy,) in of_others[name]]
            axes.plot(*zip(*crosses, strict=True), "x", color=color, markersize=7)

    if of_others:
        axes.plot([], [], "x", color=_TARGET, markersize=7, label="published")

    drawn = [points for _, points in (*everything, *of_others.items())]
    sparsest = min(90.0, *(100 * (1 - sparsity) for points in drawn for sparsity, _ in points))
    margin = (100 / sparsest) ** 0.04
    ticks = _density_ticks(sparsest / margin)
    limits = (100 * margin, sparsest / margin)
    axes.set(xscale="log", xlim=limits, xlabel=f"{xlabels[0]} (log scale)", ylabel=ylabel)
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    above = axes.secondary_xaxis("top")
    above.set_xticks(ticks, [f"{100 - tick:.10g}%" for tick in ticks])
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel(xlabels[1])
    axes.set_ylim(_accuracy_limits([*groups, *(accuracies for each in of_others.values() for _, accuracies in each)]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines["right"].set_visible(False)
    title = "mean, 95 % interval" if max(map(len, groups)) > 1 else ""
    title = ", ".join(filter(None, (title, _seeds(groups) if alike else "")))
    figure.legend(loc="outside right upper", frameon=False, title=title, alignment="left")

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _check_points(name: str, points: Points) -> None:
    if not points:
        raise ValueError(f"The curve {name!r} has no point. Leave it out.")
    for sparsity, accuracies in points:
        check_sparsity(sparsity, f"sparsity of {name!r}")
        if not accuracies:
            raise ValueError(f"{name!r} has no accuracy at sparsity {sparsity:g}. Leave the point out.")
        _check_accuracies(f"{name!r} at sparsity {sparsity:g}", accuracies)


def _check_accuracies(name: str, accuracies: Sequence[float]) -> None:
    for accuracy in accuracies:
        if not 0 <= accuracy <= 1:  # NaN too
            raise ValueError(f"An accuracy is a share in [0, 1], not percent; one of {name} is {accuracy}.")


def _mean_and_half(accuracies: Sequence[float]) -> tuple[float, float]:
    """Their mean and half the width of its 95 % interval; NaN, which is not drawn, if there is one accuracy."""
    if len(accuracies) < 2:
        return accuracies[0], math.nan
    interval = t_interval(accuracies)
    return interval.mean, interval.high - interval.mean


def _accuracy_limits(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits that hold every accuracy and its intervals, these at most half the accuracies' span beyond them."""
    values = [value for group in groups for value in group]
    ends = [mean + sign * half for mean, half in map(_mean_and_half, groups) for sign in (-1, 1)]
    ends = [end for end in ends if not math.isnan(end)]
    low, high = min(values), max(values)
    beyond = max(high - low, 0.01) / 2
    bottom, top = max(min([low, *ends]), low - beyond), min(max([high, *ends]), high + beyond)
    margin = max(0.05 * (top - bottom), (0.01 - (top - bottom)) / 2)
    return bottom - margin, top + margin


def _seeds(groups: Sequence[Sequence[float]]) -> str:
    """Over how many seeds the groups are."""
    fewest, most = min(map(len, groups)), max(map(len, groups))
    return f"{most} seed{'s' if most > 1 else ''}" if fewest == most else f"{fewest} to {most} seeds"


def _density_ticks(lowest: float) -> list[float]:
    """Round densities in percent from 100 down to at least `lowest`: as many as have room for their labels."""
    width = math.log10(100 / lowest)
    powers = range(math.floor(math.log10(lowest)), 3)
    ticks: list[float] = []
    for mantissas in _MANTISSAS:
        every = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
        ticks = sorted((tick for tick in every if lowest <= tick <= 100), reverse=True)
        if all(math.log10(left / right) > 0.1 * width for left, right in pairwise(ticks)):
            break
    return ticks


def _short_names(names: Sequence[str]) -> tuple[str, str, list[str]]:
    """The dotted parts that all names share at both ends, and what is left of each (at least one part)."""
    parts = [name.split(".") for name in names]
    front, back, shortest = 0, 0, min(map(len, parts))
    while front < shortest - 1 and len({tuple(part[: front + 1]) for part in parts}) == 1:
        front += 1
    while back < shortest - 1 - front and len({part[len(part) - back - 1] for part in parts}) == 1:
        back += 1
    left = [".".join(part[front : len(part) - back]) for part in parts]
    return (
        "".join(f"{part}." for part in parts[0][:front]),
        "".join(f".{p}" for p in parts[0][len(parts[0]) - back :]),
        left,
    )
