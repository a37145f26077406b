"""What N:M weights cost on a CPU, where no kernel uses them: a training step of ViT-S, against the dense step.

    python experiments/overhead/nm.py             # about 8 minutes on 2 cores; writes results/nm.json, then
    python experiments/overhead/nm.py --report    # the table of this folder's README.md

Blocks of the variants are interleaved in one process. Run it on a machine that does nothing else.
"""

import argparse
import json
import logging
import os
import warnings
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from overhead import THREADS, StepTimer, _cpu, _summary
from torch import Tensor
from torch.utils.data import DataLoader

from sparsetrain import BidirectionalWeightPruning, StraightThroughNM
from sparsetrain.cli.artifacts import git_state
from sparsetrain.report import markdown_table

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "nm.json", HERE / "README.md"
BEGIN, END = "<!-- nm:begin -->", "<!-- nm:end -->"

BATCH, SIDE, BLOCKS, BATCHES = 64, 224, 6, 6
BAR = 1.15
VARIANTS: dict[str, Callable[[], list[L.Callback]]] = {
    "dense": list,
    "BDWP 2:4": lambda: [BidirectionalWeightPruning()],
    "SR-STE 2:4": lambda: [StraightThroughNM()],
}


class Task(L.LightningModule):
    """ViT-S/16 with 1,000 classes; the optimizer lasts from one block to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("vit_small_patch16_224")
        self.kept_optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kept_optimizer


def measure() -> dict[str, Any]:
    """Seconds of a step of every variant, another one first in each round."""
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    batch = (torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, 1000, (BATCH,)))
    tasks = {name: Task() for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for block in range(BLOCKS):
        names = list(VARIANTS)
        for name in names[block % len(names) :] + names[: block % len(names)]:
            timer = StepTimer()
            trainer = L.Trainer(
                max_epochs=1,
                accelerator="cpu",
                precision="bf16-mixed",
                callbacks=[timer, *VARIANTS[name]()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(tasks[name], DataLoader([batch] * BATCHES, batch_size=None))
            seconds[name].append(timer.block_s())
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "lightning", "timm")},
        "device": {"name": _cpu(), "cores": os.cpu_count(), "threads": THREADS},
        "load_before": load,
        "step": {name: _summary(values, reference=seconds["dense"]) for name, values in seconds.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The step of each variant."""
    lines = [
        (
            name,
            f"{row['min_s'] * 1e3:.0f}",
            f"{row['median_s'] * 1e3:.0f}",
            f"{row['ratio_of_minima']:.3f}",
            f"{row['ratio_of_medians']:.3f}",
            f"<= {BAR}" if name == "BDWP 2:4" else "",
        )
        for name, row in results["step"].items()
    ]
    return markdown_table(("variant", "minimum, ms", "median, ms", "ratio of minima", "ratio of medians", "bar"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table of results/nm.json")
    if not parser.parse_args().report:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    device = results["device"]
    facts = f"{device['name']}, {device['threads']} threads; load average before {results['load_before']:.2f}."
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{facts}\n\n{table(results)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
