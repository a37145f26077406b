"""Runs on two processes: what they do lies here, where a spawned process can import it."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conformance.harness import SaveEverywhere, TinyModule, fit, samples, seed_all
from conformance.methods import METHODS
from torch import Tensor, multiprocessing, nn

from sparsetrain import PolarizationGating, Selection
from sparsetrain.callbacks import L1Penalty, LinearWeight
from sparsetrain.data import InMemoryLoader

MOMENTS = ("004-005-batch", "011-010-epoch")
PENALTY = 0.01


class RankedModule(TinyModule):
    """Each rank trains on its own share of the data."""

    def train_dataloader(self) -> InMemoryLoader:
        images, labels = samples()
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return InMemoryLoader(images, labels, batch_size=4, mean=[128.0], std=[64.0], shuffle=True, **place)


class EvenModule(RankedModule):
    """Without batch norm, dropout and jitter: its loss is a mean over samples, whatever ranks they lie on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 16))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return batch


def gating() -> PolarizationGating:
    """Gates of `EvenModule` that look at the input; they become a static network before the last step."""
    return PolarizationGating(
        sparsity=0.3,
        extract_at=14,
        polarization=LinearWeight(1.0, 0, 10),
        begin=0,
        end=5,
        budget=10.0,
        gate_lr=0.1,
        hidden=4,
        input_shape=(1, 4, 4),
        where=Selection(include=("body.1.weight",)),
    )


def gate_decisions(**settings: Any) -> dict[str, Any]:
    """What gates did in a run, and what they became; in float64, for they turn over where a logit is rounded."""
    callback = fit(gating(), make=EvenModule, precision="64-true", **settings).callback
    return {
        "open": callback.history_of_gates,
        "cost": callback.history_of_cost,
        "closed": [unit.name for unit in callback.units],
        "masks": dict(callback.masks),
    }


class OwnSeed(L.Callback):
    """Gives each rank random streams of its own, in a run that is not resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            seed_all(100 + trainer.global_rank)


class Perturb(L.Callback):
    """Changes a weight of rank 1 alone, between its gradients and the update of step 4."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.get_parameter("body.5.weight").neg_().add_(0.5)


class WriteChecksum(L.Callback):
    """Writes each rank's checksum of the masks, as a run in spawned processes leaves nothing else behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        checksums = [callback.masks.checksum() for callback in trainer.callbacks if hasattr(callback, "masks")]
        (self.folder / f"{trainer.global_rank}.txt").write_text(f"{trainer.world_size} {checksums}")


def run_on_two(folder: Path, port: int) -> None:
    """Run `work` on two processes that form a group of Lightning's "ddp"."""
    multiprocessing.spawn(work, (folder, port), nprocs=2)


def work(rank: int, folder: Path, port: int) -> None:
    """Fit every method, again from some of its checkpoints, a penalty and gates; write what each run ended with."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier test: Lightning would seed the ranks with it, and them only
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "limit_val_batches": 0, "data": {}}
    for method in METHODS:
        saved, again = folder / method.name, folder / f"{method.name}-again"

        def train(to: Path, ckpt_path: Path | None = None, method: Any = method) -> dict[str, Any]:
            callbacks = [OwnSeed(), method.make(check="full"), SaveEverywhere(to)]
            run = fit(*callbacks, make=RankedModule, ckpt_path=ckpt_path, **settings)
            return {"outcome": run.outcome(), "batches": run.trace.batches}

        results = {"full": train(saved)}
        for moment in MOMENTS:
            results[moment] = train(again, saved / f"{moment}.ckpt")
        torch.save(results, folder / f"{method.name}-{rank}.pt")
    penalized = fit(L1Penalty(PENALTY), make=EvenModule, **settings).module
    torch.save(penalized.state_dict(), folder / f"penalty-{rank}.pt")
    torch.save(gate_decisions(**settings), folder / f"gates-{rank}.pt")
    try:
        fit(METHODS[0].make(), Perturb(), make=RankedModule, **settings)
    except RuntimeError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))
