"""Differences of arms from their control, paired by seed, in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsetrain.report import paired


def draw(path: Path, differences: Mapping[str, Sequence[float]], *, control: str) -> None:
    """Draw each arm's differences: a hollow dot a seed, beside their mean and its 95 % interval.

    Every seed is in the picture, but not all of an interval that reaches far beyond them.

    Args:
        path: of the picture.
        differences: arm -> test accuracy less the control's, of two or more seeds, in percentage points.
        control: its name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.2 + 0.42 * len(differences)), layout="constrained")
    axes = figure.subplots()
    intervals = [paired(every) for every in differences.values()]
    for row, (every, interval) in enumerate(zip(differences.values(), intervals, strict=True)):
        axes.plot(every, [row + 0.22] * len(every), "o", color="#3b6ea5", markerfacecolor="none", markersize=4.5)
        half = interval.high - interval.mean
        axes.errorbar([interval.mean], [row], xerr=[half], fmt="s", color="#3b6ea5", markersize=5, capsize=3)
    axes.axvline(0, color="#444444", linestyle="--", linewidth=1.2)
    seeds = [0.0, *(value for every in differences.values() for value in every)]
    low, high = min(seeds), max(seeds)
    beyond = (high - low) / 4
    left = max(min(low, *(interval.low for interval in intervals)), low - beyond)
    right = min(max(high, *(interval.high for interval in intervals)), high + beyond)
    margin = 0.03 * (right - left)
    axes.set(xlim=(left - margin, right + margin), ylim=(len(differences) - 0.4, -0.6))
    axes.set_yticks(range(len(differences)), [f"{arm} ({len(every)})" for arm, every in differences.items()])
    axes.set_xlabel(f"test accuracy less that of {control}, points: seeds (their number), mean, 95 % interval")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
