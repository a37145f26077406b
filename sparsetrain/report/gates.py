"""A picture of gates over a run: which share of each layer's is open, and what the network would cost."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

Shares = Sequence[tuple[int, float]]  # (optimizer step, share in [0, 1])

_COST, _OPEN, _BUDGET = "#c8442d", "#3b6ea5", "#444444"
_ROUNDING = 1e-6  # of sums in float32


def draw_gates(
    path: Path | str, history: Mapping[str, Shares], *, cost: Shares = (), budget: float | None = None
) -> None:
    """Draw the cost and the mean share of open gates over the steps (left), and the share in each layer (right).

    Args:
        path: the file; its suffix chooses the format (.png, .pdf, .svg). Its folder is made.
        history: layer -> (optimizer step, share of its gates that are open) points, in network order; the steps rise,
            and are the same for all layers.
        cost: (optimizer step, expected cost as a share of the dense one's) points.
        budget: the share of the dense cost that is to be left, a horizontal line.

    Raises:
        ValueError: no layer, a layer without points, steps that do not rise or that differ between layers, or a share
            outside [0, 1].
    """
    from matplotlib.figure import Figure

    steps = _common_steps(history)
    for name, points in {**history, "the cost": cost}.items():
        for step, share in points:
            if not -_ROUNDING <= share <= 1 + _ROUNDING:  # NaN too
                raise ValueError(f"A share lies in [0, 1]; that of {name!r} is {share} at step {step}.")

    few = len(history) <= 16
    figure = Figure(figsize=(12, max(4.0, 1.3 + (0.2 if few else 0.135) * len(history))), layout="constrained")
    overall, by_layer = figure.subplots(1, 2)
    overall.set_box_aspect(0.7)  # the right panel grows with the network, the left one stays legible
    overall.set_anchor("N")
    shares = [[share for _, share in points] for points in history.values()]
    means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
    if cost:
        overall.plot(*zip(*cost, strict=True), color=_COST, linewidth=1.8, label="expected cost")
    overall.plot(steps, means, color=_OPEN, linestyle=":", linewidth=1.8, label="open, mean over layers")
    if budget is not None:
        overall.axhline(budget, color=_BUDGET, linestyle="--", linewidth=1.2, label="budget")
    last = max([steps[-1], *(step for step, _ in cost)])
    overall.set(xlabel="optimizer step", ylabel="share", xlim=(steps[0], max(last, steps[0] + 1)), ylim=(0, 1.02))
    overall.grid(alpha=0.3, linewidth=0.6)
    overall.spines[["top", "right"]].set_visible(False)
    overall.legend(loc="lower left", frameon=False)

    end = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    mesh = by_layer.pcolormesh([*steps, end], range(len(shares) + 1), shares, vmin=0, vmax=1, cmap="viridis")
    by_layer.invert_yaxis()
    by_layer.set_yticks([row + 0.5 for row in range(len(shares))], list(history), fontsize=9 if few else 6.5)
    by_layer.tick_params(axis="y", length=0)
    by_layer.set(xlabel="optimizer step")
    by_layer.set_title("Share of open gates", fontsize=11)
    figure.colorbar(mesh, ax=by_layer, aspect=30)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _common_steps(history: Mapping[str, Shares]) -> list[int]:
    if not history:
        raise ValueError("There is no gated layer to draw.")
    first, *others = history
    steps = [step for step, _ in history[first]]
    if not steps:
        raise ValueError(f"There is no step to draw of the gates of {first!r}.")
    if any(later <= step for step, later in pairwise(steps)):
        raise ValueError(f"The steps of the gates of {first!r} do not rise: {steps}. Give them in order, each once.")
    for name in others:
        if [step for step, _ in history[name]] != steps:
            raise ValueError(
                f"The gates of {name!r} were noted at other steps than those of {first!r}. Note all of them together."
            )
    return steps
