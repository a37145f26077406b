"""What masks cost: the training step, one update, its growth with the model, and the checkpoint, beside the peers.

    python experiments/overhead/overhead.py             # 11 minutes on 2 cores; writes results/overhead.json, then
    python experiments/overhead/overhead.py --report    # the tables of this folder's README.md and of the project's

What is compared runs in one process, in turn. Run it on a machine that does nothing else: the load before the start is
written down with the results.
"""

import argparse
import copy
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from timm.optim import Muon
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import SGD, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from sparsetrain import GradualMagnitudePruning, Masks, OneShot
from sparsetrain.cli.artifacts import cpu_name, git_state
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, READMES = HERE / "results" / "overhead.json", (HERE / "README.md", HERE.parents[1] / "README.md")

THREADS = 2
SPARSITY = 0.8
BLOCKS, BATCHES, WARM = 16, 8, 2  # blocks of each variant; batches in a block; steps at its begin that do not count
SLOW_BLOCKS = 4
BATCH, SIDE = 16, 64
ROUNDS, SLOW_ROUNDS = 9, 2
SIZES = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)


class Task(L.LightningModule):
    """ResNet-50 with 10 classes; the optimizer, and with it the momentum, lasts from one block to the next."""

    def __init__(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
        super().__init__()
        self.network = timm.create_model("resnet50", num_classes=10)
        self.kept_optimizer = optimizer(self.network.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Optimizer:
        return self.kept_optimizer


class UnknownSGD(SGD):
    """SGD that cannot be built from its parameters alone, so that the probe must take it not to preserve zeros.

    Its arithmetic is that of SGD: what it costs more is the second pass.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, secret: object, lr: float, momentum: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum)


class StepTimer(L.Callback):
    """Seconds from the start of each batch to the start of the next: all that Lightning and its callbacks do.

    Args:
        warm: first steps that do not count.
    """

    def __init__(self, warm: int = WARM) -> None:
        self.warm = warm
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def block_s(self) -> float:
        """Mean over the steps that count."""
        return (self.starts[-1] - self.starts[self.warm]) / (len(self.starts) - 1 - self.warm)


def sgd(params: Iterable[nn.Parameter]) -> SGD:
    return SGD(params, lr=0.01, momentum=0.9)


def unknown_sgd(params: Iterable[nn.Parameter]) -> SGD:
    return UnknownSGD(params, secret=None, lr=0.01, momentum=0.9)


def muon(params: Iterable[nn.Parameter]) -> Muon:
    return Muon(params, lr=0.01)


def gradual() -> L.Callback:
    return GradualMagnitudePruning(OneShot(SPARSITY))


def measure_steps(blocks: int) -> dict[str, Any]:
    """The training step without masks, with ours and with Lightning's, and what each leaves in a checkpoint."""
    torch.manual_seed(0)
    batch = (torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, 10, (BATCH,)))
    tasks = {
        "plain": Task(sgd),
        "gmp": Task(sgd),
        "gmp_unknown_optimizer": Task(unknown_sgd),
        "model_pruning": Task(sgd),
    }
    peer = tasks["model_pruning"]
    _fit(peer, [batch], _model_pruning(peer, apply=True))  # it prunes at the end of an epoch
    makers: dict[str, Callable[[], list[L.Callback]]] = {
        "plain": list,
        "gmp": lambda: [gradual()],
        "gmp_unknown_optimizer": lambda: [gradual()],
        "model_pruning": lambda: [_model_pruning(peer, apply=False)],
    }
    seconds, sizes = _interleave(tasks, makers, batch, blocks)
    # The optimizers that are known to move zeros orthogonalise each matrix: one step takes seconds.
    slow_tasks = {"muon": Task(muon), "gmp_muon": Task(muon)}
    slow_seconds, _ = _interleave(
        slow_tasks, {"muon": list, "gmp_muon": makers["gmp"]}, batch, min(blocks, SLOW_BLOCKS)
    )
    return {
        "step": {
            **{name: summarize(values, reference=seconds["plain"]) for name, values in seconds.items()},
            **{name: summarize(values, reference=slow_seconds["muon"]) for name, values in slow_seconds.items()},
        },
        "checkpoint": sizes,
    }


def _interleave(
    tasks: dict[str, Task],
    makers: dict[str, Callable[[], list[L.Callback]]],
    batch: tuple[Tensor, Tensor],
    blocks: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of a step in each block of each task, another one first in each round; and its last checkpoint's size."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    sizes: dict[str, dict[str, float]] = {}
    for block in range(blocks):
        names = list(tasks)
        for name in names[block % len(names) :] + names[: block % len(names)]:
            timer = StepTimer()
            trainer = _fit(tasks[name], [batch] * BATCHES, timer, *makers[name]())
            seconds[name].append(timer.block_s())
            if block == blocks - 1:
                sizes[name] = _checkpoint_size(trainer)
    return seconds, sizes


def _fit(task: Task, batches: Sequence[Any], *callbacks: L.Callback) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(batches, batch_size=None))
    return trainer


def _model_pruning(task: Task, *, apply: bool) -> ModelPruning:
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module, "weight") for module in _layers(task)],
        amount=SPARSITY,
        apply_pruning=apply,
        make_pruning_permanent=False,  # else it saves no masks, and a resumed run has none
        use_lottery_ticket_hypothesis=False,
    )


def _layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]


def _checkpoint_size(trainer: L.Trainer) -> dict[str, float]:
    """Bytes of the file, and bits that its masks take for each weight that they cover (0 without masks)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.ckpt"
        trainer.save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        size_bytes = path.stat().st_size
    ours = [state["masks"].values() for state in checkpoint["callbacks"].values() if "masks" in state]
    peers = [tensor for name, tensor in checkpoint["state_dict"].items() if name.endswith("weight_mask")]
    masks = [mask for group in ours for mask in group] + peers
    module = trainer.lightning_module
    weights = sum(layer.weight.numel() for layer in _layers(module))
    bits = 8 * sum(mask.numel() * mask.element_size() for mask in masks)
    return {"size_bytes": size_bytes, "mask_bits_per_weight": bits / weights}


def measure_update(rounds: int, slow_rounds: int) -> dict[str, Any]:
    """One global magnitude update of ResNet-50 with 1,000 classes, and what computes the same by other means.

    All weights are drawn alike. In timm's fresh network the classifier's are so small that global pruning leaves only
    its floor of them, which takes a second ranking: that is measured, too.
    """
    torch.manual_seed(0)
    fresh = timm.create_model("resnet50", num_classes=1000)
    network = copy.deepcopy(fresh)
    for layer in _layers(network):
        nn.init.normal_(layer.weight, std=0.02)
    weights = [layer.weight.detach() for layer in _layers(network)]
    total = sum(weight.numel() for weight in weights)
    masks = Masks()

    def first() -> None:
        masks.update(0.5)

    def nested() -> None:
        masks.update(SPARSITY)

    def floor() -> None:
        masks.update(SPARSITY)

    def kthvalue() -> None:
        magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
        torch.kthvalue(magnitudes, math.floor(SPARSITY * total + 0.5))

    def global_unstructured() -> None:
        pairs = [(layer, "weight") for layer in _layers(pruned)]
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=SPARSITY)

    names = ("first", "nested", "floor", "kthvalue", "global_unstructured")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        masks.bind(network)
        seconds["first"].append(_seconds(first))
        seconds["nested"].append(_seconds(nested))
        masks.bind(fresh)
        seconds["floor"].append(_seconds(floor))
        seconds["kthvalue"].append(_seconds(kthvalue))
        if number < slow_rounds:
            pruned = copy.deepcopy(network)
            seconds["global_unstructured"].append(_seconds(global_unstructured))
    masks.bind(network)
    peaks = {"first": _peak_bytes(first), "nested": _peak_bytes(nested), "kthvalue": _peak_bytes(kthvalue)}
    masks.bind(fresh)
    peaks["floor"] = _peak_bytes(floor)
    pruned = copy.deepcopy(network)
    peaks["global_unstructured"] = _peak_bytes(global_unstructured) - 4 * total  # its masks are float32
    rows = {
        name: {**summarize(values), "extra_bytes_per_weight": peaks[name] / total} for name, values in seconds.items()
    }
    return {"weights": total, "rows": rows}


def measure_growth(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """A first update of ten equal tensors, from the smallest to the largest model, in turn."""
    torch.manual_seed(0)
    largest = nn.Sequential(*[nn.utils.skip_init(nn.Linear, 1000, max(sizes) // 10_000, bias=False) for _ in range(10)])
    for layer in largest:
        nn.init.normal_(layer.weight)
    networks = {}
    for size in sizes:
        networks[size] = nn.Sequential(*[nn.utils.skip_init(nn.Linear, 1, 1, bias=False) for _ in range(10)])
        for small, large in zip(networks[size], largest, strict=True):
            small.weight = nn.Parameter(large.weight[: size // 10_000].detach())  # shares its memory
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            masks = Masks()
            masks.bind(networks[size])
            seconds[size].append(_seconds(lambda masks=masks: masks.update(SPARSITY)))
    least = [min(values) for values in seconds.values()]
    logs = [math.log(size) for size in sizes]
    exponent = statistics.linear_regression(logs, [math.log(value) for value in least]).slope
    rows = [
        {"weights": size, **summarize(values), "ns_per_weight": min(values) / size * 1e9}
        for size, values in seconds.items()
    ]
    return {"exponent": exponent, "rows": rows}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made in `work` took at one moment, also those inside of operators.

    Every allocation and release of torch's CPU allocator, as its profiler saw them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def summarize(seconds: Sequence[float], *, reference: Sequence[float] | None = None) -> dict[str, Any]:
    least, median = min(seconds), statistics.median(seconds)
    summary: dict[str, Any] = {"min_s": least, "median_s": median, "all_s": [round(value, 6) for value in seconds]}
    if reference is not None:
        summary["ratio_of_minima"] = least / min(reference)
        summary["ratio_of_medians"] = median / statistics.median(reference)
    return summary


def measure(*, quick: bool) -> dict[str, Any]:
    """Everything; `quick` only tries whether it runs."""
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    results = {
        "update": measure_update(2 if quick else ROUNDS, 1 if quick else SLOW_ROUNDS),
        "growth": measure_growth(SIZES[:2] if quick else SIZES, 2 if quick else ROUNDS),
        **measure_steps(2 if quick else BLOCKS),
    }
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning", "timm")},
        "device": {"name": cpu_name(), "cores": os.cpu_count(), "threads": THREADS},
        "load_before": load,
        "total_s": round(time.perf_counter() - start, 1),
        **results,
    }


def summary_table(results: dict[str, Any]) -> str:
    """The figures that have a bar, beside their peers."""
    step, update, growth, checkpoint = (results[key] for key in ("step", "update", "growth", "checkpoint"))
    rows, plain = update["rows"], checkpoint["plain"]["size_bytes"]
    ours, slow, quick = rows["first"], rows["global_unstructured"], rows["kthvalue"]
    least, most = growth["rows"][0]["weights"], growth["rows"][-1]["weights"]
    millions = f"{update['weights'] / 1e6:.1f} M weights"
    lines = [
        (
            "training step with masks, against the plain step",
            f"{step['gmp']['ratio_of_minima']:.3f}",
            "<= 1.03",
            f"`ModelPruning` {step['model_pruning']['ratio_of_minima']:.3f}",
        ),
        (
            "the same with an optimizer that moves zeros (Muon)",
            f"{step['gmp_muon']['ratio_of_minima']:.3f}",
            "<= 1.05",
            "",
        ),
        (
            "the same with one that is as fast as SGD and cannot be probed",
            f"{step['gmp_unknown_optimizer']['ratio_of_minima']:.3f}",
            "<= 1.05",
            "",
        ),
        (
            f"one global magnitude update, {millions}",
            f"{ours['min_s']:.3f} s (nested in another {rows['nested']['min_s']:.3f} s)",
            "<= 0.3 s",
            f"`prune.global_unstructured` {slow['min_s']:.2f} s, `torch.kthvalue` {quick['min_s']:.3f} s",
        ),
        (
            "its extra memory beside the masks, a weight, at most",
            f"{max(rows[name]['extra_bytes_per_weight'] for name in ('first', 'nested', 'floor')):.2f} bytes",
            "<= 1.3 bytes",
            f"{slow['extra_bytes_per_weight']:.1f} and {quick['extra_bytes_per_weight']:.1f} bytes",
        ),
        (
            f"its growth from {least / 1e6:.0f} M to {most / 1e6:.0f} M weights",
            f"n^{growth['exponent']:.2f}",
            "linear",
            "",
        ),
        (
            "masks in a checkpoint, a weight",
            f"{checkpoint['gmp']['mask_bits_per_weight']:.2f} bits",
            "1 bit",
            f"`ModelPruning` {checkpoint['model_pruning']['mask_bits_per_weight']:.0f} bits",
        ),
        (
            "checkpoint, against the plain one",
            f"{checkpoint['gmp']['size_bytes'] / plain:.3f}",
            "<= 1.1",
            f"`ModelPruning` {checkpoint['model_pruning']['size_bytes'] / plain:.3f}",
        ),
    ]
    return markdown_table(("figure", "sparsetrain", "bar", "peer"), lines)


def detail_tables(results: dict[str, Any]) -> str:
    """Every measured row."""
    names = {
        "plain": "no masks",
        "gmp": "`GradualMagnitudePruning`",
        "gmp_unknown_optimizer": "the same, optimizer not known to preserve zeros",
        "muon": "Muon, no masks",
        "gmp_muon": "Muon, `GradualMagnitudePruning`",
        "model_pruning": "Lightning `ModelPruning`",
        "first": "`Masks.update(0.5)`, first",
        "nested": f"`Masks.update({SPARSITY})`, nested in it",
        "floor": f"`Masks.update({SPARSITY})`, first, one tensor falls to its floor",
        "kthvalue": "`torch.kthvalue` on joined magnitudes (the threshold only, no masks)",
        "global_unstructured": "`torch.nn.utils.prune.global_unstructured`",
    }
    steps = [
        (
            names[name],
            f"{row['min_s'] * 1e3:.1f}",
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['ratio_of_minima']:.3f}",
            f"{row['ratio_of_medians']:.3f}",
        )
        for name, row in results["step"].items()
    ]
    updates = [
        (names[name], f"{row['min_s']:.3f}", f"{row['median_s']:.3f}", f"{row['extra_bytes_per_weight']:.2f}")
        for name, row in results["update"]["rows"].items()
    ]
    growth = [
        (f"{row['weights']:,}", f"{row['min_s']:.4f}", f"{row['median_s']:.4f}", f"{row['ns_per_weight']:.1f}")
        for row in results["growth"]["rows"]
    ]
    sizes = [
        (names[name], f"{row['size_bytes']:,}", f"{row['mask_bits_per_weight']:.3f}")
        for name, row in results["checkpoint"].items()
    ]
    return "\n\n".join(
        [
            "### Training step, ms",
            markdown_table(("variant", "minimum", "median", "ratio of minima", "ratio of medians"), steps),
            f"### One update over {results['update']['weights']:,} weights, s",
            markdown_table(("what", "minimum", "median", "extra bytes a weight"), updates),
            f"### Growth: time ~ n^{results['growth']['exponent']:.3f}",
            markdown_table(("weights", "minimum, s", "median, s", "ns a weight"), growth),
            "### Checkpoint",
            markdown_table(("run", "bytes", "mask bits a weight"), sizes),
        ]
    )


def write_report(results: dict[str, Any]) -> None:
    """Put the tables into the READMEs: all of them into this folder's, the summary into the project's."""
    device, versions = results["device"], results["versions"]
    commit = results["git"]["commit"] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    cpu = f"{device['name']}, {device['threads']} threads of {device['cores']} cores"
    facts = f"{cpu}; {software}; {results['date']}, commit {commit[:10]}"
    summary = summary_table(results)
    source = (
        "Made by `python experiments/overhead/overhead.py` from "
        "[its results](experiments/overhead/results/overhead.json); details in "
        "[experiments/overhead](experiments/overhead/README.md)."
    )
    own, project = READMES
    load = f"load average before {results['load_before']:.2f}"
    write_between(own, "overhead", f"{facts}; {load}.\n\n{summary}\n\n{detail_tables(results)}")
    write_between(project, "overhead", f"{summary}\n\n{facts}. {source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try whether everything runs; prints, writes nothing")
    parser.add_argument("--report", action="store_true", help="only write the tables of results/overhead.json")
    arguments = parser.parse_args()
    if arguments.quick:
        results = measure(quick=True)
        print(f"{summary_table(results)}\n\n{detail_tables(results)}")
        return
    if not arguments.report:
        results = measure(quick=False)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_report(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
