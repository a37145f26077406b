"""What do gates cost a training step? `PolarizationGating` in a Trainer, beside the dense step.

    python experiments/polarization/gates_cost.py             # writes results/gates_cost.json and the table
    python experiments/polarization/gates_cost.py --report    # only the table of results/gates_cost.json
    python experiments/polarization/gates_cost.py --quick     # only tries whether it runs; writes nothing

Run it on a machine that does nothing else.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from speed import circumstances, facts
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsetrain import PolarizationGating
from sparsetrain.callbacks import LinearWeight
from sparsetrain.models import CifarResNet, LeNet300100
from sparsetrain.models.timm import timm_model
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "gates_cost.json", HERE / "README.md"

BAR = 1.15
ARMS = {"dense": "dense", "input": "gates that look at the input", "static": "static gates"}


@dataclass(frozen=True)
class Case:
    """A network and how it is trained.

    Args:
        title: what the table calls it.
        make: makes the network.
        shape: of an example.
        batch: examples in a batch.
        blocks: fits of each arm.
        steps: of a block, the first two of which do not count.
        barred: whether the bar is for it.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    blocks: int
    steps: int
    barred: bool = False


CASES = {
    "resnet50": Case("timm resnet50", lambda: timm_model("resnet50", num_classes=10), (3, 224, 224), 8, 8, 5, True),
    "resnet20": Case("ResNet-20", lambda: CifarResNet(20), (3, 32, 32), 128, 8, 12),
    "lenet": Case("LeNet-300-100", lambda: LeNet300100((1, 28, 28)), (1, 28, 28), 128, 8, 102),
}


class Task(L.LightningModule):
    """A network of 10 classes under SGD with momentum; the optimizer lasts from one block to the next."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.kept_optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kept_optimizer


class Block(L.Callback):
    """Ends the fit after so many steps, long before its gates become a static network, and times them.

    Args:
        steps: at least 3; the first two do not count.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = len(self.starts) > self.steps

    def step_s(self) -> float:
        """Mean seconds from the start of a batch to that of the next: all that Lightning and its callbacks do."""
        return (self.starts[-1] - self.starts[2]) / (len(self.starts) - 3)


def gating(arm: str, shape: tuple[int, int, int]) -> list[L.Callback]:
    """The callback of an arm, with both terms in the loss."""
    if arm == "dense":
        return []
    weights = {"polarization": LinearWeight(1.0), "budget": 1.0}
    return [PolarizationGating(input_shape=shape, hidden=16 if arm == "input" else None, **weights)]


def step_s(task: Task, case: Case, batch: tuple[Tensor, Tensor], arm: str) -> float:
    """Seconds of a step, in a block of an arm."""
    block = Block(case.steps)
    trainer = L.Trainer(
        max_steps=10_000,
        accelerator="cpu",
        callbacks=[block, *gating(arm, case.shape)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([batch] * (case.steps + 1), batch_size=None))
    return block.step_s()


def measure_case(case: Case) -> dict[str, Any]:
    """Seconds of a step of each arm, in blocks in turn, another one first each time."""
    torch.manual_seed(0)
    batch = (torch.randn(case.batch, *case.shape), torch.randint(0, 10, (case.batch,)))
    tasks = {arm: Task(case.make()) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(case.blocks):
        arms = list(ARMS)
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            seconds[arm].append(round(step_s(tasks[arm], case, batch, arm), 6))
    return {
        "title": case.title,
        "shape": case.shape,
        "batch": case.batch,
        "steps": case.steps - 2,
        "bar": BAR if case.barred else None,
        "seconds": seconds,
    }


def measure(cases: Mapping[str, Case]) -> dict[str, Any]:
    """All cases, and what they were measured with."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    before = circumstances("lightning", "timm", "torch-pruning")
    return {**before, "cases": {name: measure_case(case) for name, case in cases.items()}}


def table(results: Mapping[str, Any]) -> str:
    """Each arm's step beside the dense one."""
    lines: list[tuple[object, ...]] = []
    for case in results["cases"].values():
        dense = case["seconds"]["dense"]
        for arm, title in ARMS.items():
            seconds = case["seconds"][arm]
            times = [f"{1000 * of(seconds):.1f}" for of in (min, median)]
            ratios = ["", ""] if arm == "dense" else [f"{of(seconds) / of(dense):.3f}" for of in (min, median)]
            bar = f"<= {case['bar']:g}" if case["bar"] and arm == "input" else ""
            name = f"{case['title']}, {case['shape'][-1]} px, batch {case['batch']}"
            lines.append((name, title, *times, *ratios, bar))
    header = ("network", "step", "minimum, ms", "median, ms", "ratio of minima", "ratio of medians", "bar")
    return f"{facts(results)}\n\n{markdown_table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--report", action="store_true", help="only write the table of results/gates_cost.json")
    modes.add_argument("--quick", action="store_true", help="only try whether it runs; writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        print(table(measure({"lenet": replace(CASES["lenet"], batch=4, blocks=1, steps=3)})))
        return
    if not arguments.report:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(CASES), indent=1) + "\n")
    write_between(README, "gates_cost", table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
