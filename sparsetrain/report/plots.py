"""One picture of a sparse run."""

import math
from collections.abc import Sequence
from pathlib import Path

from sparsetrain.masks import Update
from sparsetrain.selection import PlanRow

_TARGET, _ACTUAL, _BAR = "#444444", "#c8442d", "#3b6ea5"


def draw_sparsity(
    path: Path | str, *, plan: Sequence[PlanRow], history: Sequence[Update], target: Sequence[tuple[int, float]]
) -> None:
    """Draw sparsity over the steps (left) and the final sparsity of each pruned tensor, in network order (right).

    Args:
        path: the file; its suffix chooses the format (.png, .pdf, .svg). Its folder is made.
        plan: one row per parameter of the module.
        history: the mask updates, in order. May be empty: then nothing has been pruned.
        target: (optimizer step, target sparsity) points of the schedule, in order of steps.

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

    if target:
        over_time.plot(*zip(*target, strict=True), color=_TARGET, linestyle="--", linewidth=1.4, label="target")
    steps = [update.step for update in history]
    actual = [1 - sum(update.kept[name] for name in sizes) / total for update in history]
    end = max([0, *steps, *(step for step, _ in target)])
    if history:
        over_time.plot(
            [*steps, end],
            [*actual, actual[-1]],
            color=_ACTUAL,
            drawstyle="steps-post",
            linewidth=1.8,
            label="actual",
        )
    over_time.set_title(f"Sparsity of the {total:,} maskable weights: {overall:.2%} at the end", fontsize=11)
    over_time.set(xlabel="optimizer step", ylabel="sparsity", xlim=(0, max(end, 1)), ylim=(0, 1))
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
