"""Images a second of a training run, beside a loop of plain PyTorch.

    python experiments/throughput/throughput.py             # on the GPU if there is one; writes results/<device>.json
    python experiments/throughput/throughput.py --report    # only the tables
    python experiments/throughput/throughput.py --quick     # only tries whether it runs; writes nothing

Run it on a machine that does nothing else.
"""

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F

from sparsetrain.cli.artifacts import cpu_name, git_state
from sparsetrain.cli.instantiate import instantiate
from sparsetrain.cli.train import compose, make_parts, train
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
CONTEXT = multiprocessing.get_context("spawn")

BAR = 0.95  # of the loop's images
MASKS = (
    *("method=gmp", "schedule=cubic", "method.schedule.final=0.9"),
    *("method.schedule.begin=0it", "method.schedule.end=0.9run", "method.schedule.every=10it"),
)
GRAPHS = ("module.compile=reduce-overhead",)


@dataclass(frozen=True)
class Way:
    """How a network is trained.

    Args:
        title: what the table calls it.
        overrides: of the run.
        processes: how many such runs at a time; on a CPU they share its cores.
        is_loop: a loop of plain PyTorch on one batch, and no run.
        against: the way whose images are the bound of its own.
        bar: for the share of that bound.
    """

    title: str
    overrides: tuple[str, ...] = ()
    processes: int = 1
    is_loop: bool = False
    against: str | None = None
    bar: float | None = None


LOOP = Way("loop of plain PyTorch", is_loop=True)
RUN = Way("run", against="loop", bar=BAR)
BOTH = {"loop": LOOP, "run": RUN, "masks": replace(RUN, title="run with gradual pruning", overrides=MASKS)}
WAYS = {
    "cpu": {
        **BOTH,
        "beside": Way("2 runs side by side", processes=2, against="run"),
    },
    "gpu": {
        **BOTH,
        "loop_graphs": replace(LOOP, title="loop, CUDA graphs", overrides=GRAPHS),
        "graphs": Way("run, CUDA graphs", GRAPHS, against="loop_graphs"),
        "masks_graphs": Way("run with gradual pruning, CUDA graphs", (*GRAPHS, *MASKS), against="loop_graphs"),
        "beside": Way("8 runs side by side", processes=8, against="run"),
        "beside_graphs": Way("8 runs side by side, CUDA graphs", GRAPHS, processes=8, against="graphs"),
    },
}


@dataclass(frozen=True)
class Case:
    """A network and its images.

    Args:
        title: what the table calls it.
        overrides: of its runs; the images are made up, of the shape of the real ones, and augmented like them.
        batch: images of a step.
        steps: of an epoch.
        epochs: of a run.
        warm: first steps of a run, and of the loop, that do not count.
        blocks: how often each way is measured.
    """

    title: str
    overrides: tuple[str, ...]
    batch: int
    steps: int
    epochs: int
    warm: int
    blocks: int


RESNET20 = (
    *("+experiment=resnet20_dense", "dataset=synthetic", "dataset.flip=true", "module.channels_last=true"),
    *("dataset.shift=4", "dataset.shape=[3,32,32]"),
)
HALF = (
    *(*RESNET20, "model.width=8", "dataset.shift=1", "dataset.shape=[3,8,8]"),
    "optim.lr=0.4",
)
CASES = {
    "cpu": {
        "resnet20": Case("ResNet-20, 32 px, batch 128", RESNET20, 128, steps=60, epochs=1, warm=4, blocks=3),
        "half": Case("ResNet-20 of half the width, 8 px, batch 512", HALF, 512, steps=100, epochs=1, warm=4, blocks=3),
    },
    "gpu": {"resnet20": Case("ResNet-20, 32 px, batch 128", RESNET20, 128, steps=351, epochs=4, warm=351, blocks=3)},
}
QUICK = {"quick": Case("ResNet-20", HALF, 4, steps=20, epochs=1, warm=2, blocks=1)}


class Clock(L.Callback):
    """Seconds of a run after its first steps, from when all runs beside it have come as far."""

    barrier: ClassVar[Barrier]
    warm: ClassVar[int]
    seconds: ClassVar[float]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == Clock.warm:
            _wait_for_device()
            Clock.barrier.wait(timeout=600)
            Clock.seconds = -time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _wait_for_device()
        Clock.seconds += time.perf_counter()


def block(case: Case, way: Way, device: str) -> float:
    """Images a second, of all processes together."""
    barrier, queue = CONTEXT.Barrier(way.processes), CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=_measure, args=(case, way, device, barrier, queue)) for _ in range(way.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{way.title} of {case.title} failed; its error is above.")
    images, seconds = zip(*(queue.get() for _ in processes), strict=True)
    return round(sum(images) / max(seconds), 1)


def _measure(case: Case, way: Way, device: str, barrier: Barrier, queue: "SimpleQueue[tuple[int, float]]") -> None:
    """Put images and seconds of one process into the queue."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // way.processes))
    with tempfile.TemporaryDirectory() as folder:
        length = (
            *(f"dataset.batch_size={case.batch}", f"dataset.train_size={case.batch * case.steps}"),
            *(f"trainer.max_epochs={case.epochs}", f"trainer.check_val_every_n_epoch={case.epochs + 1}"),
        )
        quiet = (
            "optimized_metric=null",
            "trainer.enable_progress_bar=false",
            f"+callbacks.clock={{_target_: {__name__}.Clock}}",
        )
        cfg = compose(*case.overrides, *way.overrides, *length, *quiet, f"trainer={device}", output_dir=folder)
        images = case.batch * (case.steps * case.epochs - case.warm)
        if way.is_loop:
            queue.put((images, _loop(cfg, case)))
            return
        Clock.barrier, Clock.warm = barrier, case.warm
        train(cfg)
        queue.put((images, Clock.seconds))


def _loop(cfg: Any, case: Case) -> float:
    """Seconds of as many steps on one batch, with the network and the optimizer of the run."""
    module, datamodule, _ = make_parts(cfg)
    device = torch.device("cuda" if cfg.trainer.accelerator == "gpu" else "cpu")
    module.to(device)
    optimizer = instantiate(cfg.optim)(module.parameters())
    images = torch.randn(case.batch, *datamodule.input_shape, device=device)
    labels = torch.randint(datamodule.num_classes, (case.batch,), device=device)
    torch.backends.cudnn.benchmark = cfg.trainer.benchmark
    start = 0.0
    for step in range(case.steps * case.epochs):
        if step == case.warm:
            _wait_for_device()
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
            loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(cases: Mapping[str, Case], device: str) -> dict[str, Any]:
    """All ways of each case, in turn, another one first each time."""
    ways = WAYS[device]
    results: dict[str, Any] = {
        "kind": device,
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning")},
        "device": torch.cuda.get_device_name() if device == "gpu" else f"{cpu_name()}, {os.cpu_count()} threads",
        "load_before": os.getloadavg()[0],
        "cases": {},
    }
    for name, case in cases.items():
        images_per_s: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(case.blocks):
            turn = number % len(ways)
            for way in [*ways][turn:] + [*ways][:turn]:
                images_per_s[way].append(block(case, ways[way], device))
                print(f"{case.title}, {ways[way].title}: {images_per_s[way][-1]:,.0f} images/s", flush=True)
        results["cases"][name] = {"title": case.title, "images_per_s": images_per_s}
    return results


def table(results: Mapping[str, Any]) -> str:
    """Median images a second of each way, and their share of what it is measured against."""
    lines, ways = [], WAYS[results["kind"]]
    for case in results["cases"].values():
        medians = {way: median(values) for way, values in case["images_per_s"].items()}
        for name, way in ways.items():
            values = case["images_per_s"][name]
            share = bound = ""
            if way.against is not None:
                share, bound = f"{medians[name] / medians[way.against]:.3f}", f"of {ways[way.against].title}"
            spread = f"{min(values):,.0f} to {max(values):,.0f}"
            bar = "" if way.bar is None else f">= {way.bar:g}"
            lines.append((case["title"], way.title, f"{medians[name]:,.0f}", spread, f"{share} {bound}".strip(), bar))
    commit = results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    origin = f"{results['device']}; {software}; {results['date']}, commit {commit}"
    origin += f"; load average before {results['load_before']:.2f}."
    header = ("network", "trained by", "images/s", "range", "share", "bar")
    return f"{markdown_table(header, lines)}\n\n{origin}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--report", action="store_true", help="only write the tables")
    modes.add_argument("--quick", action="store_true", help="only try whether it runs; writes nothing")
    arguments = parser.parse_args()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    if arguments.quick:
        print(table(measure(QUICK, device)))
        return
    if not arguments.report:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{device}.json").write_text(json.dumps(measure(CASES[device], device), indent=1) + "\n")
    for path in RESULTS.glob("*.json"):
        write_between(README, path.stem, table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
