"""Plain-text and Markdown tables, and the CSV of every mask update."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from sparsetrain.masks import Update
from sparsetrain.report.measure import Report
from sparsetrain.selection import PlanRow


def is_accuracy(metric: str) -> bool:
    """Whether the metric is a share of right answers, in [0, 1].

    >>> is_accuracy("test/accuracy"), is_accuracy("val/top5"), is_accuracy("test/loss")
    (True, True, False)
    """
    return metric.rpartition("/")[2].startswith(("accuracy", "top"))


def metric_text(metric: str, value: float) -> str:
    """A value as tables write it: an accuracy in per cent, anything else with four digits."""
    return f"{value:.2%}" if is_accuracy(metric) else f"{value:.4g}"


def plan_table(plan: Sequence[PlanRow]) -> str:
    """What will be pruned and why not the rest: one line per parameter, and the sum."""
    sizes = [math.prod(row.shape) for row in plan]
    rows = [
        (row.name, _shape(row.shape), f"{size:,}", "yes" if row.pruned else f"no: {row.reason}")
        for row, size in zip(plan, sizes, strict=True)
    ]
    pruned = [size for row, size in zip(plan, sizes, strict=True) if row.pruned]
    share = sum(pruned) / max(sum(sizes), 1)
    return (
        _align(("parameter", "shape", "weights", "pruned"), rows, "lrrl")
        + f"\n{len(pruned)} of {len(plan)} parameters are pruned: "
        + f"{sum(pruned):,} of {sum(sizes):,} weights ({share:.1%})."
    )


def report_table(report: Report) -> str:
    """What is sparse: one line per masked tensor, and the sums; FLOPs of one example, in millions."""
    header = ("tensor", "shape", "weights", "kept", "sparsity", "dense MFLOPs", "theoretical MFLOPs")
    rows = [
        (
            layer.name,
            _shape(layer.shape),
            f"{layer.total:,}",
            f"{layer.kept:,}",
            f"{layer.sparsity:.2%}",
            _mega(layer.dense_flops),
            _mega(layer.theoretical_flops),
        )
        for layer in report.layers
    ]
    pruned = report.maskable - report.kept
    rows += [
        (
            "all with a mask",
            "",
            f"{report.maskable:,}",
            f"{report.kept:,}",
            f"{report.sparsity:.2%}",
            "",
            "",
        ),
        (
            "all parameters",
            "",
            f"{report.parameters:,}",
            f"{report.parameters - pruned:,}",
            f"{report.sparsity_of_all:.2%}",
            _mega(report.dense_flops),
            _mega(report.theoretical_flops),
        ),
    ]
    columns = len(header) if report.dense_flops is not None else 5
    table = _align(header[:columns], [row[:columns] for row in rows], "lrrrrrr"[:columns])
    revived = f"\n{report.revived:,} masked weights are not 0." if report.revived else ""
    return table + revived


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells are written with `str`, a `|` inside one is escaped.

    Raises:
        ValueError: a row has more or fewer cells than the header.

    >>> print(markdown_table(("method", "test"), [("dense", 97.1)]))
    | method | test |
    | --- | --- |
    | dense | 97.1 |
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"The header has {len(header)} columns; the row {tuple(row)!r} has {len(row)} cells.")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_between(readme: Path, name: str, body: str) -> None:
    """Replace what stands between the markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Args:
        readme: a Markdown file.
        name: of the markers.
        body: Markdown, such as `markdown_table` gives.

    Raises:
        ValueError: one of them is missing; nothing is written.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme} has no {begin} ... {end}. Add both lines where the table shall stand.")
    readme.write_text(f"{before}{begin}\n{body}\n{end}{after}")


def write_sparsity_csv(path: Path | str, plan: Sequence[PlanRow], history: Sequence[Update]) -> None:
    """Write one row per mask update and pruned tensor.

    Columns: step (optimizer step), layer, shape, numel, kept, target (sparsity asked of all pruned tensors together),
    actual (this tensor's sparsity), dropped and grown (weights masked and unmasked by this update).

    Args:
        path: the file; its folder is made, and an older file replaced.
        plan: one row per parameter of the module.
        history: the updates, in order. May be empty: then only the header is written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "layer", "shape", "numel", "kept", "target", "actual", "dropped", "grown"))
        for update in history:
            for row in plan:
                if not row.pruned:
                    continue
                numel, kept = math.prod(row.shape), update.kept[row.name]
                actual = f"{(numel - kept) / numel:.8g}"
                dropped, grown = update.dropped[row.name], update.grown[row.name]
                shape, target = _shape(row.shape), f"{update.target:.8g}"
                writer.writerow((update.step, row.name, shape, numel, kept, target, actual, dropped, grown))


def _align(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """Columns two spaces apart, each to the left ("l") or right ("r"), under a ruled header."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in lines
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _mega(flops: int | None) -> str:
    return "" if flops is None else f"{flops / 1e6:,.3f}"
