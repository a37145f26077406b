"""What a run leaves in its folder."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsetrain import __version__
from sparsetrain.callbacks import PolarizationGating, Shrinking, SparsityCallback
from sparsetrain.callbacks.nm_training import NMTraining
from sparsetrain.callbacks.trainer import callbacks_of
from sparsetrain.mask_files import save_masks
from sparsetrain.masks import Masks, Update
from sparsetrain.report import draw_gates, draw_sparsity, measure, report_table, training_flops, write_sparsity_csv

SUMMARY, CONFIG, MODEL = "summary.json", "config.yaml", "model.safetensors"
SPARSITY, MASKS, PICTURE, GATES = "sparsity.csv", "masks.safetensors", "sparsity.png", "gates.png"


class Artifacts(L.Callback):
    """Writes what the training leaves, in the process that trained: with `ddp_spawn` the first one knows weights only.

    sparsity.csv is written at each end of validation too. summary.json is completed by `add_to_summary` after the test;
    until then it has "val" only if the last validation was of the network that the fit leaves. What it counts is of
    that network, after `Shrinking` of the small one; training_flops are of both, each over its own batches.

    Args:
        folder: the run's.
        method: how the network becomes sparse; None for a dense run.
        example_input: a batch of one example, to count FLOPs with.
        facts: how it is run, for the summary: name, command, seed, ...
    """

    def __init__(
        self, folder: Path, method: SparsityCallback | None, example_input: Tensor, facts: Mapping[str, Any]
    ) -> None:
        self.folder, self.method, self.example_input, self.facts = folder, method, example_input, dict(facts)
        self._batches, self._seconds, self._begun = 0, 0.0, math.nan
        self._validated: int | None = None
        self._shrinking: Shrinking | None = None
        self._whole_flops: int | None = None
        self._whole_batches: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._shrinking is None else {"whole_batches": self._whole_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._whole_batches = state_dict["whole_batches"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count the FLOPs of a network that is to shrink, which is still whole here in a resumed run, too."""
        if stage != "fit":
            return
        self._validated = None
        self._shrinking = next((one for one in callbacks_of(trainer) if isinstance(one, Shrinking)), None)
        if self._shrinking is not None:
            self._whole_flops = measure(pl_module, {}, self.example_input).dense_flops

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count the batches of an epoch."""
        self._batches, self._seconds, self._begun = 0, 0.0, math.nan

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Count the batch before, with all that was done from its start to this one's."""
        if self._whole_batches is None and self._shrinking is not None and self._shrinking.removed is not None:
            self._whole_batches = _completed(trainer)
        now = time.perf_counter()
        if not math.isnan(self._begun):
            self._batches, self._seconds = self._batches + 1, self._seconds + now - self._begun
        self._begun = now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the batch that validation follows."""
        self._begun = math.nan

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the updates so far."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = trainer.global_step
        if self.method is not None:
            write_sparsity_csv(self.folder / SPARSITY, self.method.plan, self.method.history)

    @rank_zero_only
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write all of it, after every callback's end of the fit; not after an exception."""
        if stage != "fit":
            return
        write_model(self.folder, pl_module)  # before all else that might fail
        if self.method is not None:
            write_sparsity(self.folder, self.method, trainer.global_step)
        report = measure(pl_module, self.method.masks if self.method else {}, self.example_input)
        if self.method is not None:
            print(report_table(report))
        is_validated = self._validated == trainer.global_step
        summary = {
            **self.facts,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            **({"val": of_stage(trainer.callback_metrics, "val")} if is_validated else {}),
            **report.to_dict(),
            "training_flops": self._training_flops(trainer, report.dense_flops),
            "examples_per_s": self._examples_per_s(trainer),
            **made_on(trainer),
        }
        if isinstance(self.method, NMTraining):
            summary["backends"] = [asdict(decision) for decision in self.method.decisions]
        if isinstance(self.method, PolarizationGating) and self.method.extraction is not None:
            summary["extraction"] = asdict(self.method.extraction)
            draw_gates(
                self.folder / GATES,
                self.method.history_of_gates,
                cost=self.method.history_of_cost,
                budget=1 - self.method.sparsity,
            )
        write_json(self.folder / SUMMARY, summary)

    def _training_flops(self, trainer: L.Trainer, flops: int | None) -> int | None:
        """FLOPs of all forward passes and, twice as many, of all backward ones; each batch is counted as a full one.

        Zeros are counted as other weights: nothing skips them by itself.

        Args:
            trainer: of the fit, at its end.
            flops: of one example, in the network that is left.
        """
        size = _batch_size(trainer)
        if flops is None or size is None:
            return None
        batches = _completed(trainer)
        forward = flops * batches
        if self._shrinking is not None and self._whole_flops is not None:
            before = batches if self._whole_batches is None else self._whole_batches
            forward = self._whole_flops * before + flops * (batches - before)
        return training_flops(forward, size * trainer.world_size)

    def _examples_per_s(self, trainer: L.Trainer) -> float | None:
        """What was trained on in a second of the last epoch, on all ranks; None if that is not known."""
        size = _batch_size(trainer)
        if size is None or self._batches == 0:
            return None
        return round(self._batches * size * trainer.world_size / self._seconds, 1)


def read_summary(folder: Path) -> dict[str, Any]:
    """The entries of summary.json."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    return summary


def add_to_summary(folder: Path, **entries: Any) -> None:
    """Add entries to summary.json, or replace them."""
    write_json(folder / SUMMARY, {**read_summary(folder), **entries})


def of_stage(metrics: Mapping[str, Any], stage: str) -> dict[str, float]:
    """The metrics logged as "<stage>/<name>", by name.

    >>> of_stage({"val/accuracy": 0.5, "test/accuracy": 0.25}, "val")
    {'accuracy': 0.5}
    """
    prefix = f"{stage}/"
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def write_model(folder: Path, module: nn.Module) -> None:
    """model.safetensors: the weights and buffers of the network, under the names that it has by itself.

    The network is `module.network` where there is one, as in `Classifier`, and else the module. So the file loads
    strictly into the plain dense model, `resnet20().load_state_dict(load_file(path))`; a checkpoint and
    masks.safetensors have the names of the LightningModule, with "network." before them. A tensor that has two names
    (tied weights) is written under both.
    """
    state = network_of(module).state_dict()
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, folder / MODEL)


def network_of(module: nn.Module) -> nn.Module:
    """`module.network`, or the module itself if it has none."""
    network = getattr(module, "network", None)
    return network if isinstance(network, nn.Module) else module


def write_sparsity(folder: Path, method: SparsityCallback, steps: int) -> None:
    """masks.safetensors, sparsity.csv and sparsity.png of a run of so many optimizer steps."""
    save_masks(method.masks, folder / MASKS)
    history = method.history or [_given(method.masks)]
    write_sparsity_csv(folder / SPARSITY, method.plan, history)
    target = [(update.step, update.target) for update in history]
    draw_sparsity(folder / PICTURE, plan=method.plan, history=history, target=[*target, (steps, target[-1][1])])


def git_state() -> dict[str, Any] | None:
    """Commit of the repository around the current folder, and whether files differ from it; None outside of one.

    The commit is None in a repository that has none yet.
    """
    status = _git("status", "--porcelain")
    if status is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit.strip() if commit else None, "dirty": bool(status.strip())}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    return {
        "sparsetrain": __version__,
        "torch": torch.__version__,
        "lightning": L.__version__,
        "python": platform.python_version(),
    }


def made_on(trainer: L.Trainer) -> dict[str, Any]:
    """Entries of summary.json: the device, and the versions and git state of the code."""
    return {"device": _device(trainer), "versions": _versions(), "git": git_state()}


def _completed(trainer: L.Trainer) -> int:
    """Training batches of the run so far, on each rank."""
    batches: int = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return batches


def _batch_size(trainer: L.Trainer) -> int | None:
    """Of one rank; None without a data module that knows it."""
    return getattr(getattr(trainer, "datamodule", None), "batch_size", None)


def _device(trainer: L.Trainer) -> dict[str, Any]:
    """The kind of device and its name, how many processes, and CPU threads of each."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "type": device.type,
        "name": name,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor, as it calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file as a whole."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write the file so that nobody ever sees a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _given(masks: Masks) -> Update:
    """Masks that no update of the run made, as one made before its first step."""
    kept = masks.kept
    dropped = {name: mask.numel() - kept[name] for name, mask in masks.items()}
    return Update(0, masks.sparsity(), kept, dropped, dict.fromkeys(kept, 0))
