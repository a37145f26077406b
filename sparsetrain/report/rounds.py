"""The facts about each round of a run that prunes and trains in turn, as a CSV file and a table."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.report.tables import markdown_table, metric_text

_COLUMNS = (
    "round",
    "first_step",
    "steps",
    "epochs_seen",
    "examples",
    "sparsity",
    "kept",
    "total",
    "overlap",
    "dense_flops",
    "theoretical_flops",
    "dense_training_flops",
    "theoretical_training_flops",
)


@dataclass(frozen=True)
class Round:
    """The facts about one round: what it trained, what it kept, what that cost and how good it is.

    Args:
        number: 0 is the dense phase, r >= 1 the round after the r-th pruning.
        first_step: the round's first optimizer step, counted over the whole fit, 0-based.
        steps: its optimizer steps; 0 for the dense phase of a network that came trained.
        epochs_seen: epochs trained since the fit began, up to the end of this round; not whole in a run by steps.
        examples: examples trained on in this round: an image seen in 3 epochs counts 3 times; all ranks together.
        kept: weights whose mask is True.
        total: weights that have a mask.
        overlap: of its masks with those of the round before, in [0, 1], by `overlap`; None for round 0.
        dense_flops: FLOPs of one example, forward, in the dense network (`Report.dense_flops`); None if not counted.
        theoretical_flops: the same less what masked multiplications take (`Report.theoretical_flops`).
        metrics: evaluated at the end of the round, by name, such as "val/accuracy", "test/accuracy", "val/loss".

    Raises:
        ValueError: a count below 0, more kept than there are, or an overlap outside [0, 1].
    """

    number: int
    first_step: int
    steps: int
    epochs_seen: float
    examples: int
    kept: int
    total: int
    overlap: float | None = None
    dense_flops: int | None = None
    theoretical_flops: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("number", "first_step", "steps", "epochs_seen", "examples", "kept"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` of a round is at least 0; it is {getattr(self, name)}.")
        if self.kept > self.total:
            raise ValueError(
                f"Round {self.number} keeps {self.kept:,} of {self.total:,} weights. Count both in the masks."
            )
        if self.overlap is not None and not 0 <= self.overlap <= 1:
            raise ValueError(f"An overlap lies in [0, 1]; that of round {self.number} is {self.overlap}.")

    @property
    def sparsity(self) -> float:
        """Share of the weights whose mask is False, in [0, 1]."""
        return (self.total - self.kept) / self.total if self.total else 0.0

    @property
    def dense_training_flops(self) -> int | None:
        """What training the dense network on this round's examples takes; None if not counted."""
        return None if self.dense_flops is None else training_flops(self.dense_flops, self.examples)

    @property
    def theoretical_training_flops(self) -> int | None:
        """What is left of `dense_training_flops` if every masked multiplication were skipped, in the gradients too."""
        return None if self.theoretical_flops is None else training_flops(self.theoretical_flops, self.examples)


def overlap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The Jaccard index of the kept weights of two masks, over all tensors together: |A and B| / |A or B|, in [0, 1].

    1 if they keep the same weights (none at all included), 0 if no weight is in both. Of nested masks, as in magnitude
    pruning without regrowth, it is kept_r / kept_{r-1}: 0.8 where each round prunes a fifth. Of independent random
    masks of densities a and b it is about a*b / (a + b - a*b): d / (2 - d) where both are d, so 0.11 at sparsity 0.8.

    Args:
        one: parameter name -> bool tensor, True = kept. `Masks` and what `load_masks` reads are such mappings.
        other: the same names and shapes; may be on other devices.

    Raises:
        ValueError: no masks, other names or shapes, or a mask that is not bool.

    >>> overlap({"weight": torch.tensor([True, True, False])}, {"weight": torch.tensor([True, False, False])})
    0.5
    """
    lonely = sorted(one.keys() ^ other.keys())
    if lonely:
        raise ValueError(f"Only one of the two has a mask for {lonely[:3]}. Compare masks of the same selection.")
    if not one:
        raise ValueError("There are no masks to compare. `Masks` is empty until `bind`.")
    both = either = 0
    for name, mask in one.items():
        _check_alike(name, mask, other[name])
        second = other[name].to(mask.device)
        common = int(torch.count_nonzero(mask & second))
        both += common
        either += int(torch.count_nonzero(mask)) + int(torch.count_nonzero(second)) - common
    return both / either if either else 1.0


def training_flops(forward_flops_per_example: int, examples: int) -> int:
    """FLOPs of training on so many examples: 3 x forward, because the backward pass takes 2 x forward.

    The gradient with respect to the weights and that with respect to the inputs each repeat the layer's multiplications
    once; that of the network's own input, which nothing needs, is counted as well. Biases, norms, activations, the loss
    and the optimizer's step are not counted, nor recomputation under activation checkpointing. With masks that stay
    fixed within a round, both gradients could skip what the forward pass skips, so it holds for theoretical FLOPs too.

    Args:
        forward_flops_per_example: as `measure` counts them, 2 x multiply-accumulates.
        examples: examples trained on, each as often as it was seen.

    >>> training_flops(2 * 266_200, 60_000)
    95832000000
    """
    return 3 * forward_flops_per_example * examples


def write_rounds_csv(path: Path | str, rounds: Sequence[Round]) -> None:
    """Write one row per round, in full precision; what is None or was not evaluated stays empty.

    Columns: round, first_step, steps, epochs_seen, examples, sparsity, kept, total, overlap, dense_flops and
    theoretical_flops (one example, forward), dense_training_flops and theoretical_training_flops (the whole round),
    then the metrics of all rounds in alphabetical order.

    Args:
        path: the file; its folder is made, and an older file replaced.
        rounds: in ascending order. May be empty: then only the header is written.

    Raises:
        ValueError: rounds that are not in ascending order, or a metric that is named like another column.
    """
    metrics = _metrics(rounds)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*_COLUMNS, *metrics))
        for row in rounds:
            fixed = (row.number, *(getattr(row, name) for name in _COLUMNS[1:]))
            measured = (float(row.metrics[name]) if name in row.metrics else None for name in metrics)
            writer.writerow((*fixed, *measured))


def rounds_table(rounds: Sequence[Round]) -> str:
    """A Markdown table with one line per round; FLOPs of the whole round, where they were counted.

    Accuracies, which are metrics called "accuracy" or "top...", are written in percent.

    Raises:
        ValueError: as `write_rounds_csv`.
    """
    metrics = _metrics(rounds)
    counted = [row.dense_training_flops for row in rounds if row.dense_training_flops is not None]
    unit, scale = _unit(max(counted, default=0))
    flops = (f"dense training {unit}", f"theoretical training {unit}") if counted else ()
    header = ("round", "first step", "steps", "epochs seen", "sparsity", "weights kept", "overlap", *flops, *metrics)
    lines = []
    for row in rounds:
        cost = (_scaled(row.dense_training_flops, scale), _scaled(row.theoretical_training_flops, scale))
        line = (
            row.number,
            f"{row.first_step:,}",
            f"{row.steps:,}",
            f"{row.epochs_seen:,.10g}",
            f"{row.sparsity:.2%}",
            f"{row.kept:,}",
            "" if row.overlap is None else f"{row.overlap:.2%}",
            *cost[: len(flops)],
            *(metric_text(name, row.metrics[name]) if name in row.metrics else "" for name in metrics),
        )
        lines.append(line)
    return markdown_table(header, lines)


def _check_alike(name: str, mask: Tensor, other: Tensor) -> None:
    for tensor in (mask, other):
        if tensor.dtype != torch.bool:
            raise ValueError(
                f"A mask is a bool tensor, True = kept; that of {name!r} is {tensor.dtype}. Use `mask != 0`."
            )
    if mask.shape != other.shape:
        raise ValueError(
            f"The masks of {name!r} have shapes {tuple(mask.shape)} and {tuple(other.shape)}. "
            "Compare masks of the same network."
        )


def _metrics(rounds: Sequence[Round]) -> list[str]:
    """The names of all metrics, sorted."""
    numbers = [row.number for row in rounds]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"Rounds come in ascending order, each once; these are {numbers}.")
    names = sorted({name for row in rounds for name in row.metrics})
    taken = sorted(set(names) & set(_COLUMNS))
    if taken:
        raise ValueError(f"The metrics {taken} are named like columns of rounds.csv. Log them as 'val/{taken[0]}'.")
    return names


def _unit(largest: int) -> tuple[str, float]:
    """The unit of FLOPs in which `largest` is at least 1, from mega to exa."""
    scales = {"EFLOPs": 1e18, "PFLOPs": 1e15, "TFLOPs": 1e12, "GFLOPs": 1e9}
    return next(((unit, scale) for unit, scale in scales.items() if largest >= scale), ("MFLOPs", 1e6))


def _scaled(flops: int | None, scale: float) -> str:
    return "" if flops is None else f"{flops / scale:,.3f}"
