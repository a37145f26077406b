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
from statistics import median, quantiles
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
        epoch: steps of an epoch.
        warm: first steps, which do not count.
        turns: how often each way is measured.
        turn: steps of a turn, the first of which does not count.
    """

    title: str
    overrides: tuple[str, ...]
    batch: int
    epoch: int
    warm: int
    turns: int
    turn: int

    @property
    def epochs(self) -> int:
        """Of a run; nothing is left over, which would train beside the turn of another one."""
        epochs, left = divmod(self.warm + self.turns * self.turn, self.epoch)
        if left:
            raise ValueError(f"{self.title}: {left} steps make no epoch.")
        return epochs


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
        "resnet20": Case("ResNet-20, 32 px, batch 128", RESNET20, 128, epoch=180, warm=4, turns=16, turn=11),
        "half": Case("ResNet-20 of half the width, 8 px, batch 512", HALF, 512, epoch=635, warm=5, turns=30, turn=21),
    },
    "gpu": {"resnet20": Case("ResNet-20, 32 px, batch 128", RESNET20, 128, epoch=351, warm=351, turns=39, turn=54)},
}
QUICK = {"quick": Case("ResNet-20", HALF, 4, epoch=10, warm=2, turns=2, turn=4)}


class Turns:
    """Lets ways train in turn, each for some steps, while the others wait at a barrier; times all but the first step.

    Args:
        barrier: of the processes of all ways.
        place: of this process's way among the ways, from 0,
        ways: and how many these are.
        case: says how many steps a turn has, and how many come before the first one.
    """

    def __init__(self, barrier: Barrier, place: int, ways: int, case: Case) -> None:
        self.barrier, self.place, self.ways, self.case = barrier, place, ways, case
        self.seconds: list[float] = []
        """Of each turn."""

    def before(self, step: int) -> None:
        """Is called before step `step`, from 0."""
        number, within = divmod(step - self.case.warm, self.case.turn)
        if number < 0:
            return
        if within == 0:
            if number:
                self.end()
            else:
                self._wait(1)
            self._wait(self.place)
        elif within == 1:
            _wait_for_device()
            self.seconds.append(-time.perf_counter())

    def end(self) -> None:
        """End the turn, and wait until those after it have had theirs."""
        _wait_for_device()
        self.seconds[-1] += time.perf_counter()
        self._wait(self.ways - self.place)

    def _wait(self, times: int) -> None:
        for _ in range(times):
            self.barrier.wait(timeout=600)


class Clock(L.Callback):
    """Lets a run take its turns."""

    turns: ClassVar[Turns]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        Clock.turns.before(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Clock.turns.end()


def images_per_s(case: Case, ways: Mapping[str, Way], device: str) -> dict[str, list[float]]:
    """Of each way, those of all its processes together, turn by turn."""
    barrier, queue = CONTEXT.Barrier(sum(way.processes for way in ways.values())), CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=_measure, args=(case, name, way, device, Turns(barrier, place, len(ways), case), queue))
        for place, (name, way) in enumerate(ways.items())
        for _ in range(way.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{case.title} failed; its error is above.")
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in processes:
        name, mine = queue.get()
        seconds[name].append(mine)
    images = case.batch * (case.turn - 1)
    return {
        name: [round(len(every) * images / max(together), 1) for together in zip(*every, strict=True)]
        for name, every in seconds.items()
    }


def _measure(
    case: Case, name: str, way: Way, device: str, turns: Turns, queue: "SimpleQueue[tuple[str, list[float]]]"
) -> None:
    """Put the seconds of one process into the queue."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // way.processes))
    with tempfile.TemporaryDirectory() as folder:
        length = (
            *(f"dataset.batch_size={case.batch}", f"dataset.train_size={case.batch * case.epoch}"),
            *(f"trainer.max_epochs={case.epochs}", f"trainer.check_val_every_n_epoch={case.epochs + 1}"),
        )
        quiet = (
            "optimized_metric=null",
            "trainer.enable_progress_bar=false",
            f"+callbacks.clock={{_target_: {__name__}.Clock}}",
        )
        cfg = compose(*case.overrides, *way.overrides, *length, *quiet, f"trainer={device}", output_dir=folder)
        Clock.turns = turns
        try:
            (_loop if way.is_loop else train)(cfg)
        except BaseException:
            turns.barrier.abort()  # nobody waits for this one
            raise
    queue.put((name, turns.seconds))


def _loop(cfg: Any) -> None:
    """As many steps on one batch, with the network and the optimizer of the run."""
    module, datamodule, _ = make_parts(cfg)
    device = torch.device("cuda" if cfg.trainer.accelerator == "gpu" else "cpu")
    module.to(device)
    optimizer = instantiate(cfg.optim)(module.parameters())
    turns = Clock.turns
    case = turns.case
    images = torch.randn(case.batch, *datamodule.input_shape, device=device)
    labels = torch.randint(datamodule.num_classes, (case.batch,), device=device)
    torch.backends.cudnn.benchmark = cfg.trainer.benchmark
    for step in range(case.epoch * case.epochs):
        turns.before(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
            loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    turns.end()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(cases: Mapping[str, Case], device: str) -> dict[str, Any]:
    """All ways of each case, in turn."""
    return {
        "kind": device,
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning")},
        "device": torch.cuda.get_device_name() if device == "gpu" else f"{cpu_name()}, {os.cpu_count()} threads",
        "load_before": os.getloadavg()[0],
        "cases": {
            name: {"title": case.title, "images_per_s": images_per_s(case, WAYS[device], device)}
            for name, case in cases.items()
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """Median images a second of each way, and their share of what it is measured against: medians over turns."""
    lines, ways = [], WAYS[results["kind"]]
    for case in results["cases"].values():
        for name, way in ways.items():
            values = case["images_per_s"][name]
            share = ""
            if way.against is not None:
                against = case["images_per_s"][way.against]
                shares = [mine / other for mine, other in zip(values, against, strict=True)]
                share = f"{median(shares):.3f} of {ways[way.against].title}"
            low, _, high = quantiles(values, n=4)
            bar = "" if way.bar is None else f">= {way.bar:g}"
            lines.append((case["title"], way.title, f"{median(values):,.0f}", f"{low:,.0f} to {high:,.0f}", share, bar))
    commit = results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    origin = f"{results['device']}; {software}; {results['date']}, commit {commit}"
    origin += f"; load average before {results['load_before']:.2f}."
    header = ("network", "trained by", "images/s", "middle half", "share", "bar")
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
