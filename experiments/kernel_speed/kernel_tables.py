"""The tables that kernel_speed.py's results give."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sparsetrain.report import markdown_table

NOT_MEASURED = "Not measured: `results/` holds none of a GPU."
MLP_BAR, VIT_BAR = ">= 1.08", ">= 1.03"

Row = Mapping[str, Any]


def tables(*results: Mapping[str, Any]) -> str:
    """The tables of this folder's README.md, of each results file."""
    return "\n\n".join(map(_tables_of, results)) or NOT_MEASURED


def _tables_of(results: Mapping[str, Any]) -> str:
    rows, device, versions = results["rows"], results["device"], results["versions"]
    commit = results["commit"][:10] if results["commit"] else "none"
    driver = f", driver {device['driver']}" if "driver" in device else ""
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    texts = [
        f"### {device['name']}, cuSPARSELt {versions['cuSPARSELt']}",
        f"{device['name']}{driver}; {software}; {results['date']}, commit {commit}.",
    ]
    if versions["cuSPARSELt"] == "0.8.0":
        texts.append(
            "**cuSPARSELt 0.8.0** is what torch 2.11 brings. NVIDIA's release notes of 0.8.1 say that 0.8.0 is slow on "
            "an H100, and that this is fixed: these numbers are the library's, not the hardware's."
        )
    searched = {_shape(row): row for row in rows.get("algorithms", ())}
    for part, make in _TABLES.items():
        if rows.get(part):
            texts += [make(rows[part], searched) if part == "products" else make(rows[part])]
    if results["left_out"]:
        texts.append(f"Not measured, for time: {', '.join(results['left_out'])}.")
    texts += [f"Failed: {failed['part']} {failed['row']}: {failed['error']}" for failed in results["failures"]]
    return "\n\n".join(texts)


def _shape(row: Row) -> tuple[Any, ...]:
    return row["rows"], row["tokens"], row["k"], row["dtype"]


def _us(row: Row, name: str) -> float:
    median: float = row["us"][name]["median_us"]
    return median


def _dense_us(row: Row) -> float:
    """Of the fastest dense variant."""
    return min(_us(row, name) for name in row["us"] if name.startswith("dense"))


def _products_table(rows: Sequence[Row], searched: Mapping[tuple[Any, ...], Row]) -> str:
    lines = []
    for row in rows:
        flops = 2 * row["rows"] * row["tokens"] * row["k"]
        other = searched.get(_shape(row))
        found = ("", "") if other is None else (f"{_us(other, 'searched'):.0f}", f"{other['algorithm']}")
        gain = "" if other is None else f"{_us(other, 'dense') / _us(other, 'searched'):.2f}"
        lines.append(
            (
                f"{row['rows']} x {row['tokens']} x {row['k']}",
                row["dtype"],
                *(f"{_us(row, name):.0f}" for name in ("dense", "dense_compiled", "masked", "sparse")),
                found[0],
                f"{_dense_us(row) / _us(row, 'sparse'):.2f}",
                gain,
                found[1],
                f"{flops / _us(row, 'sparse') / 1e6:.0f}",
                *(f"{row['error'][name]:.1e}" for name in ("dense", "sparse")),
            )
        )
    header = (
        *("out x tokens x in", "dtype", "dense, us", "compiled", "masked dense", "sparse", "searched"),
        *("fastest dense / sparse", "dense / searched", "algorithm", "sparse, effective TFLOP/s"),
        *("error, dense", "error, sparse"),
    )
    return "#### One product y = x @ W^T\n\n" + markdown_table(header, lines)


def _packing_table(rows: Sequence[Row]) -> str:
    names = ("prune", "compress", "copy")
    lines = [
        (
            f"{row['out']} x {row['in']}",
            *(f"{_us(row, name):.0f} us, {row['us'][name]['gb_per_s']:.0f} GB/s" for name in names),
        )
        for row in rows
    ]
    header = ("weight", "prune, both operands", "compress, both", "copy of the float32 weight")
    return "#### Once for each weight and optimizer step\n\n" + markdown_table(header, lines)


def _host_table(rows: Sequence[Row]) -> str:
    lines = [(name, f"{_us(row, name):.1f}") for row in rows for name in row["us"]]
    return "#### Time of the host for a call\n\n" + markdown_table(("call", "us"), lines)


def _memory_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            row["call"],
            f"{row['calls']:,}",
            f"{row['growth_per_call']['host_bytes']:.1f}",
            f"{row['growth_per_call']['device_bytes']:.1f}",
        )
        for row in rows
    ]
    header = ("call", "calls", "growth of the host's memory, bytes a call", "of the device's")
    return "#### Memory over many calls\n\n" + markdown_table(header, lines)


def _mlp_table(rows: Sequence[Row]) -> str:
    names = ("dense", "dense_compiled", "dense_bfloat16", "masked", "sparse")
    lines = [
        (
            row["width"],
            f"{row['tokens']:,}",
            *(f"{_us(row, name) / 1e3:.2f}" for name in names),
            f"{_us(row, 'dense') / _us(row, 'sparse'):.3f}",
            f"{_dense_us(row) / _us(row, 'sparse'):.3f}",
            MLP_BAR if (row["width"], row["tokens"]) == (4096, 16384) else "",
        )
        for row in rows
    ]
    header = (
        *("d", "tokens", "dense, ms", "compiled", "bfloat16 weights", "masked dense", "sparse"),
        *("dense / sparse", "fastest dense / sparse", "bar for dense / sparse"),
    )
    return "#### Forward and backward of an MLP block d, 4d, d\n\n" + markdown_table(header, lines)


def _steps_table(rows: Sequence[Row], bar: str = "") -> str:
    names = ("dense", "dense_compiled", "bdwp", "bdwp_compiled")
    lines = [
        (
            row["batch"],
            *(f"{_us(row, name) / 1e3:.1f}" for name in names),
            f"{row['sparse_layers']} of {row['layers']}",
            f"{_us(row, 'dense_compiled') / min(_us(row, name) for name in names[2:]):.3f}",
            bar,
        )
        for row in rows
    ]
    header = (
        *("batch", "dense, ms", "compiled", 'BDWP, backend="auto"', "the same, compiled"),
        *("sparse layers", "dense compiled / faster BDWP", "bar"),
    )
    return f"#### A training step of {rows[0]['name']}\n\n" + markdown_table(header, lines)


_TABLES: dict[str, Callable[..., str]] = {
    "mlp": _mlp_table,
    "vit": partial(_steps_table, bar=VIT_BAR),
    "gpt": _steps_table,
    "products": _products_table,
    "packing": _packing_table,
    "host": _host_table,
    "memory": _memory_table,
}
