"""Is a network without half of its FLOPs faster? Forward passes on a CPU, beside the dense network.

    python experiments/polarization/speed.py             # writes results/speed.json and the table
    python experiments/polarization/speed.py --report    # only the table of results/speed.json
    python experiments/polarization/speed.py --quick     # only tries whether it runs, with ResNet-8; writes nothing

Run it on a machine that does nothing else.
"""

import argparse
import copy
import json
import math
import os
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.fx.experimental.optimization import fuse

from sparsetrain import Selection, export
from sparsetrain.callbacks.gated import gated_layers
from sparsetrain.cli.artifacts import cpu_name, git_state
from sparsetrain.models import CifarResNet
from sparsetrain.models.timm import timm_model
from sparsetrain.report import cost, markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "speed.json", HERE / "README.md"

LEFT = 0.5
BAR = 0.8
WAYS = {
    "contiguous": "contiguous",
    "channels_last": "channels last",
    "folded": "channels last, batch norm folded",
    "compiled": "channels last, compiled",
}


@dataclass(frozen=True)
class Removal:
    """What may go.

    Args:
        title: what the table calls it.
        units: those of a network of which some go.
        group: each layer keeps a multiple of so many channels; None: the units are whole blocks.
    """

    title: str
    units: Callable[[nn.Module, Tensor], Sequence[export.Unit]]
    group: int | None


def inner(model: nn.Module, example: Tensor) -> list[export.Unit]:
    """The channels that `PolarizationGating` gates, not those that residual blocks add up."""
    return [unit for layer in gated_layers(model, export.units(model, example), Selection()) for unit in layer.units]


REMOVALS = {
    "inner_1": Removal("inner channels", inner, 1),
    "inner_8": Removal("inner channels, multiples of 8", inner, 8),
    "all_1": Removal("all channels", export.units, 1),
    "blocks": Removal("blocks", export.blocks, None),
}


@dataclass(frozen=True)
class Case:
    """A network and the batches that it is given.

    Args:
        title: what the table calls it.
        make: makes the dense network.
        side: of the images, in pixels.
        repetitions: batch size -> how often each variant is timed.
        barred: the batch size that the bar is for, if any.
    """

    title: str
    make: Callable[[], nn.Module]
    side: int
    repetitions: Mapping[int, int]
    barred: int | None = None


CASES = {
    "resnet50": Case("timm resnet50", lambda: timm_model("resnet50", num_classes=1000), 224, {32: 5, 1: 21}, 32),
    "resnet56": Case("ResNet-56", lambda: CifarResNet(56), 32, {128: 9, 1: 51}),
    "resnet20": Case("ResNet-20", lambda: CifarResNet(20), 32, {128: 9, 1: 51}),
}
QUICK = {"resnet8": Case("ResNet-8", lambda: CifarResNet(8), 8, {2: 2, 1: 2}, 2)}


def smaller(dense: nn.Module, example: Tensor, removal: Removal) -> nn.Module:
    """A copy of `dense` with about `LEFT` of its FLOPs.

    Groups of channels, or blocks, are removed in random order over all layers, as many as come nearest; the first group
    of each layer stays. What a layer keeps is then as uneven as after training.
    """
    model = copy.deepcopy(dense)
    units = removal.units(model, example)
    if removal.group is None:
        order = [[unit] for unit in units]
    else:
        by_layer: dict[str, list[export.Unit]] = {}
        for unit in units:
            by_layer.setdefault(unit.name.rpartition("[")[0], []).append(unit)
        order = [
            layer[first : first + removal.group]
            for layer in by_layer.values()
            for first in range(removal.group, len(layer), removal.group)
        ]
    random.Random(0).shuffle(order)
    flops = cost(model, example)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def left(count: int) -> float:
        removed: dict[str, dict[int, set[int]]] = {}
        chosen = [*chain(*order[:count])]
        for piece in chain(*(unit.slices for unit in chosen if not unit.is_block)):
            removed.setdefault(piece.tensor, {}).setdefault(piece.dim, set()).update(piece.index)
        shares = {
            name.removesuffix(".weight"): math.prod(1 - len(gone) / shapes[name][dim] for dim, gone in dims.items())
            for name, dims in removed.items()
        }
        channels = sum(whole * shares.get(layer, 1.0) for layer, whole in flops.items())
        return (channels - sum(unit.flops for unit in chosen if unit.is_block)) / sum(flops.values())

    enough = bisect_left(range(len(order)), True, key=lambda count: left(count) <= LEFT)
    nearest = min((enough - 1, enough), key=lambda count: abs(left(count) - LEFT))
    chosen = [*chain(*order[:nearest])]
    export.silence(model, chosen)
    return export.shrink(model, chosen, example)


def ways(network: nn.Module) -> dict[str, nn.Module]:
    """The network as each of `WAYS` runs it."""
    return {
        "contiguous": copy.deepcopy(network),
        "channels_last": copy.deepcopy(network).to(memory_format=torch.channels_last),
        "folded": fuse(network).to(memory_format=torch.channels_last),
        "compiled": torch.compile(copy.deepcopy(network).to(memory_format=torch.channels_last), dynamic=False),
    }


def measure_case(case: Case) -> dict[str, Any]:
    """FLOPs of the dense network and of the smaller ones, and seconds of each batch in each way."""
    torch.manual_seed(0)
    dense = case.make().eval()
    example = torch.randn(1, 3, case.side, case.side)
    networks = {"dense": dense, **{name: smaller(dense, example, removal) for name, removal in REMOVALS.items()}}
    variants = {(name, way): running for name, network in networks.items() for way, running in ways(network).items()}
    batches = []
    for size, repetitions in case.repetitions.items():
        torch.compiler.reset()  # it runs a module uncompiled when it has compiled the class for too many others
        with inductor.patch(freezing=True):  # what TORCHINDUCTOR_FREEZING=1 sets
            seconds = in_turn(variants, torch.randn(size, 3, case.side, case.side), repetitions)
        by_network = {name: {way: seconds[name, way] for way in WAYS} for name in networks}
        batches.append({"size": size, "bar": BAR if size == case.barred else None, "seconds": by_network})
    return {
        "title": case.title,
        "side": case.side,
        "flops": {name: sum(cost(network, example).values()) for name, network in networks.items()},
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        "batches": batches,
    }


@torch.no_grad()
def in_turn(
    variants: Mapping[tuple[str, str], nn.Module], images: Tensor, repetitions: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each variant, one after the other, another one first each time; a first round does not count."""
    laid_out = {way: images if way == "contiguous" else images.to(memory_format=torch.channels_last) for way in WAYS}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    keys = list(variants)
    for number in range(repetitions + 1):
        turn = number % len(keys)
        for key in keys[turn:] + keys[:turn]:
            start = time.perf_counter()
            variants[key](laid_out[key[1]])
            if number > 0:
                seconds[key].append(round(time.perf_counter() - start, 6))
    return seconds


def measure(cases: Mapping[str, Case]) -> dict[str, Any]:
    """All cases, and what they were measured with."""
    before = circumstances("timm", "torch-pruning")
    return {**before, "cases": {name: measure_case(case) for name, case in cases.items()}}


def circumstances(*packages: str) -> dict[str, Any]:
    """Date, code, versions and device of a measurement, for its results file."""
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", *packages)},
        "device": {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load_before": os.getloadavg()[0],
    }


def table(results: Mapping[str, Any]) -> str:
    """Median times of each way to run, and speed-ups beside the FLOPs ratio; the last one is of the quickest ways."""
    lines = []
    for case in results["cases"].values():
        for batch in case["batches"]:
            medians = {name: [median(times[way]) for way in WAYS] for name, times in batch["seconds"].items()}
            lines += [_line(case, batch, name, medians) for name in medians]
    header = (
        *("network", "batch", "removed from", "FLOPs", "parameters"),
        *(f"{title}, ms (speed-up)" for title in WAYS.values()),
        *("quickest of each: speed-up", "FLOPs ratio", "speed-up / FLOPs ratio", "bar"),
    )
    return f"{facts(results)}\n\n{markdown_table(header, lines)}"


def _line(
    case: Mapping[str, Any], batch: Mapping[str, Any], name: str, medians: Mapping[str, Sequence[float]]
) -> Sequence[object]:
    title = (f"{case['title']}, {case['side']} px", batch["size"])
    if name == "dense":
        flops, parameters = f"{case['flops'][name] / 1e9:.3g} G", f"{case['parameters'][name] / 1e6:.3g} M"
        return (*title, "nothing", flops, parameters, *(f"{1000 * s:.1f}" for s in medians[name]), "", "", "", "")
    share, parameters = (case[what][name] / case[what]["dense"] for what in ("flops", "parameters"))
    times = [f"{1000 * s:.1f} ({d / s:.2f})" for s, d in zip(medians[name], medians["dense"], strict=True)]
    speed_up = min(medians["dense"]) / min(medians[name])
    return (
        *(*title, REMOVALS[name].title, f"{share:.1%}", f"{parameters:.1%}", *times),
        *(f"{speed_up:.2f}", f"{1 / share:.2f}", f"{speed_up * share:.2f}"),
        "" if batch["bar"] is None else f">= {batch['bar']:g}",
    )


def summary_table(results: Mapping[str, Any]) -> str:
    """Speed-ups of the batch that the bar is for, the quickest way to run each network; one line per removal."""
    lines = []
    for case in results["cases"].values():
        for batch in (one for one in case["batches"] if one["bar"] is not None):
            quickest = {name: min(median(times) for times in ways.values()) for name, ways in batch["seconds"].items()}
            for name in (name for name in quickest if name != "dense"):
                share = case["flops"][name] / case["flops"]["dense"]
                gain = quickest["dense"] / quickest[name]
                title = f"{case['title']}, batch {batch['size']}"
                ratio = f"{gain * share:.2f}"
                lines.append(
                    (title, REMOVALS[name].title, f"{share:.1%}", f"{gain:.2f}", ratio, f">= {batch['bar']:g}")
                )
    header = ("network, on a CPU", "removed from", "FLOPs left", "speed-up", "speed-up / FLOPs ratio", "bar")
    return markdown_table(header, lines)


def facts(results: Mapping[str, Any]) -> str:
    """What the figures were measured with, in a sentence."""
    device, commit = results["device"], results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{device['name']}, {device['threads']} threads of {device['cores']} cores; {software}; {results['date']}, "
        f"commit {commit}; load average before {results['load_before']:.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--report", action="store_true", help="only write the table of results/speed.json")
    modes.add_argument("--quick", action="store_true", help="only try whether it runs; writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        print(table(measure(QUICK)))
        return
    if not arguments.report:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(CASES), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    write_between(README, "speed", table(results))
    write_between(HERE.parents[1] / "README.md", "smaller", summary_table(results))


if __name__ == "__main__":
    main()
