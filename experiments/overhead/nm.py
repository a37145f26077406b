"""What N:M weights cost a step without sparse kernels: BDWP 2:4 on the reference backend, beside the dense step.

    python experiments/overhead/nm.py             # writes results/nm.json, then
    python experiments/overhead/nm.py --report    # the table of this folder's README.md

Run it on a machine that does nothing else.
"""

import argparse
import json
import logging
import os
import warnings
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from overhead import THREADS, StepTimer, summarize
from torch import Tensor
from torch.utils.data import DataLoader

from sparsetrain import BidirectionalWeightPruning
from sparsetrain.cli.artifacts import cpu_name, git_state
from sparsetrain.report import markdown_table, write_between

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "nm.json", HERE / "README.md"

BAR = 1.15
MODEL, SIDE, BATCH = "vit_small_patch16_224", 224, 64
PRECISIONS = {"bf16-mixed": 2, "32-true": 3}  # -> blocks of each arm
STEPS = 3  # of a block; from the start of the first to that of the last


class Task(L.LightningModule):
    """A ViT-S with 1,000 classes under AdamW; the optimizer lasts from one block to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model(MODEL)
        self.kept_optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kept_optimizer


def block_s(task: Task, batch: tuple[Tensor, Tensor], precision: Any, *callbacks: L.Callback) -> float:
    """Seconds of a step, all that Lightning and its callbacks do included."""
    timer = StepTimer(warm=0)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        callbacks=[timer, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([batch] * STEPS, batch_size=None))
    return timer.block_s()


def measure(*, quick: bool) -> dict[str, Any]:
    """Both arms in turn, in both precisions; `quick` only tries whether it runs."""
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    size = 2 if quick else BATCH
    batch = (torch.randn(size, 3, SIDE, SIDE), torch.randint(0, 1000, (size,)))
    step = {}
    for precision, blocks in PRECISIONS.items():
        tasks = {"dense": Task(), "bdwp": Task()}
        seconds: dict[str, list[float]] = {arm: [] for arm in tasks}
        for block in range(2 if quick else blocks):
            for arm in sorted(tasks, reverse=block % 2 == 0):
                method = [BidirectionalWeightPruning()] if arm == "bdwp" else []
                seconds[arm].append(block_s(tasks[arm], batch, precision, *method))
        step[precision] = {arm: summarize(values, reference=seconds["dense"]) for arm, values in seconds.items()}
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning", "timm")},
        "device": {"name": cpu_name(), "cores": os.cpu_count(), "threads": THREADS},
        "load_before": load,
        "model": MODEL,
        "batch": size,
        "step": step,
    }


def table(results: dict[str, Any]) -> str:
    """Both arms in both precisions."""
    lines = []
    for precision, arms in results["step"].items():
        for arm, name, bar in (("dense", "dense", ""), ("bdwp", "BDWP 2:4, masked products", f"<= {BAR}")):
            found = arms[arm]
            ratios = (f"{found[key]:.3f}" for key in ("ratio_of_minima", "ratio_of_medians"))
            lines.append((precision, name, f"{found['min_s']:.2f}", f"{found['median_s']:.2f}", *ratios, bar))
    device, software = results["device"], ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    head = (
        f"{results['model']}, batch {results['batch']}; {device['name']}, {device['threads']} threads of "
        f"{device['cores']} cores; {software}; {results['date']}, commit {results['git']['commit'][:10]}; load average "
        f"before {results['load_before']:.2f}."
    )
    header = ("precision", "step", "minimum, s", "median, s", "ratio of minima", "ratio of medians", "bar")
    return f"{head}\n\n{markdown_table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table of results/nm.json")
    parser.add_argument("--quick", action="store_true", help="tiny and not written: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        print(table(measure(quick=True)))
        return
    if not arguments.report:
        RESULTS.write_text(json.dumps(measure(quick=False), indent=1) + "\n")
    write_between(README, "nm", table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
