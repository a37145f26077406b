"""A tiny task that has everything which makes resume hard, and the means to stop a run anywhere and compare runs."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from sparsetrain import ExactResume, SparsityCallback, ops
from sparsetrain.data import InMemoryLoader

SAMPLES, BATCH, EPOCHS = 40, 8, 3
STEPS = SAMPLES // BATCH * EPOCHS


class TinyModule(L.LightningModule):
    """Convolution, batch norm, dropout and two linear layers on jittered images; draws from every random generator.

    Args:
        schedule: "one_cycle" sized by Lightning's estimate of the steps, "epoch" (StepLR) or "plateau".
    """

    def __init__(self, *, schedule: str = "one_cycle") -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64, 16),
        )
        self.head = nn.Linear(16, 3)
        self.schedule = schedule

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(images)))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return (images + 0.1 * (random.random() + np.random.rand()), labels) if self.training else batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", nn.functional.cross_entropy(self(images), labels))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test/loss", nn.functional.cross_entropy(self(images), labels))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        if self.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        if self.schedule == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PlainModule(TinyModule):
    """The same with one optimizer and no schedule.

    Args:
        optimizer: makes it from the module's parameters.
    """

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer() if self.optimizer is None else self.optimizer(self.parameters())


def samples() -> tuple[Tensor, Tensor]:
    """Images, uint8 [40, 1, 4, 4], and labels of 3 classes."""
    stream = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (SAMPLES, 1, 4, 4), generator=stream, dtype=torch.uint8)
    return images, torch.randint(0, 3, (SAMPLES,), generator=stream)


def loaders() -> dict[str, Any]:
    """Train and validation loaders, as arguments of `Trainer.fit`."""
    images, labels = samples()
    settings: dict[str, Any] = {"batch_size": BATCH, "mean": [128.0], "std": [64.0]}
    return {
        "train_dataloaders": InMemoryLoader(images, labels, shuffle=True, **settings),
        "val_dataloaders": InMemoryLoader(images[:16], labels[:16], **settings),
    }


@dataclass(eq=False)
class Trace(L.Callback):
    """What a run did, by the number of batches made: loss and learning rates of each, metrics of each validation."""

    batches: dict[int, list[float]] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        loss = [float(outputs["loss"])] if outputs else []
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.batches[trainer.fit_loop.total_batch_idx + 1] = loss + rates

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations[trainer.fit_loop.total_batch_idx + 1] = float(trainer.callback_metrics["val/loss"])


class Saved(NamedTuple):
    """A checkpoint, and the moment of saving: the number of batches made, and "batch", "validation" or "epoch"."""

    path: Path
    batches: int
    moment: str


class SaveEverywhere(L.Callback):
    """Saves at each moment at which Lightning's own callbacks may save: after a batch, a validation and an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[Saved] = []

    def _save(self, trainer: L.Trainer, moment: str) -> None:
        if not trainer.sanity_checking:
            batches = trainer.fit_loop.total_batch_idx + 1
            path = self.folder / f"{len(self.saved):03d}-{batches:03d}-{moment}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append(Saved(path, batches, moment))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")


class SaveNowhere(L.Callback):
    """Stands for a `SaveEverywhere` in a run whose checkpoints nobody reads: writing them takes a third of its time."""

    state_key = SaveEverywhere.__qualname__


class Watch(Checkpoint):
    """Asserts at every moment that pruned weights are zero; being a `Checkpoint`, it comes after every masking.

    Attributes:
        seen: how often it looked at sparse weights, by moment.
    """

    def __init__(self, *, regrow: bool = False) -> None:
        self.regrow = regrow
        self.seen: Counter[str] = Counter()
        self.before: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def look(self, trainer: L.Trainer, weights: Mapping[str, Tensor], moment: str) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, SparsityCallback):
                callback.read_masks()
                for name, mask in callback.masks.items():
                    assert not weights[name][~mask].any(), (moment, name, callback.step)
                    assert self.regrow or not (mask & ~self.before.get(name, mask)).any(), ("regrown", name)
                    self.before[name] = mask.clone()
                    self.seen[moment] += int(not mask.all())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer, weights_in_use(pl_module), "start")
        for optimizer in trainer.optimizers:
            hook = optimizer.register_step_post_hook(lambda *_: self.look(trainer, weights_in_use(pl_module), "step"))
            self.handles.append(hook)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(trainer, weights_in_use(pl_module), "batch end")

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(trainer, weights_in_use(pl_module), "validation")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        key = "state_dict"
        if "current_model_state" in checkpoint and any(True for _ in ops.effective_layers(pl_module)):
            key = "current_model_state"  # the average of masters in the other one has masks of its own
        self.look(trainer, checkpoint[key], "checkpoint")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self.handles:
            handle.remove()
        self.look(trainer, weights_in_use(pl_module), "end")


def weights_in_use(module: L.LightningModule) -> dict[str, Tensor]:
    """The weights that the forward pass multiplies with, by parameter name."""
    effective = {f"{name}.weight": layer.effective()[0] for name, layer in ops.effective_layers(module)}
    return dict(module.named_parameters()) | effective


@dataclass(frozen=True)
class Run:
    """A fit that has ended."""

    module: L.LightningModule
    trainer: L.Trainer
    trace: Trace

    @property
    def callback(self) -> SparsityCallback:
        return next(c for c in self.trainer.callbacks if isinstance(c, SparsityCallback))

    def outcome(self) -> dict[str, Any]:
        """All that a resumed run must share with the uninterrupted one."""
        return {
            "module": self.module.state_dict(),
            "masks": [dict(c.masks) for c in self.trainer.callbacks if isinstance(c, SparsityCallback)],
            "callbacks": {c.state_key: c.state_dict() for c in self.trainer.callbacks},
            "optimizers": [optimizer.state_dict() for optimizer in self.trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
            "step": self.trainer.global_step,
        }


def make_trainer(*callbacks: L.Callback, exact: bool = True, **settings: Any) -> L.Trainer:
    """A silent Trainer on the CPU, with `ExactResume` unless not `exact`."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=[*([ExactResume()] if exact else []), *callbacks], **(defaults | settings))


def fit(
    *callbacks: L.Callback,
    make: Callable[[], L.LightningModule] = TinyModule,
    data: Mapping[str, Any] | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Run:
    """Train; a resumed run begins with other weights and random streams, so that all it shares is what it restored."""
    seed_all(3 if ckpt_path is None else 99)
    module = make()
    trace = Trace()
    trainer = make_trainer(*callbacks, trace, **settings)
    trainer.fit(module, **(loaders() if data is None else data), ckpt_path=ckpt_path)
    return Run(module, trainer, trace)


def seed_all(seed: int) -> None:
    """Seed the generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two nested states are not equal bit for bit."""
    if is_dataclass(one):
        one, other = vars(one), vars(other)
    if isinstance(one, Tensor | np.ndarray):
        first, second = torch.as_tensor(one), torch.as_tensor(other)
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield path
    elif isinstance(one, Mapping):
        if one.keys() != other.keys():
            yield f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{path}: {len(one)} and {len(other)} entries"
        for index, (first, second) in enumerate(zip(one, other, strict=False)):
            yield from differences(first, second, f"{path}/{index}")
    elif one != other:
        yield f"{path}: {one} and {other}"


def assert_same(one: Any, other: Any) -> None:
    """All entries at the same paths and equal bit for bit."""
    found = list(differences(one, other))
    assert not found, found[:5]
