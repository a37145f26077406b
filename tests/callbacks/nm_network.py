"""Small networks for N:M training, their data, records of the dense master, and the references, written by hand."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from conformance.harness import loaders, make_trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from sparsetrain import BidirectionalWeightPruning, StraightThroughNM, ops

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 0.02
Batch = tuple[Tensor, Tensor]
MasksOf = Callable[[Tensor], tuple[Tensor, Tensor]]
SCALED = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
BDWP = BidirectionalWeightPruning
STE = StraightThroughNM


class Regression(L.LightningModule):
    """Any network under the mean squared error, trained by SGD with momentum and weight decay.

    Args:
        net: from the batch's first tensor to the shape of its second.
        settings: of SGD.
    """

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.net = net
        self.settings = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY} | settings

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        y = self(batch[0])
        self.log("val/loss", F.mse_loss(y, batch[1]), batch_size=len(y))
        return y

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", F.mse_loss(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.settings)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
    )


def batches(net: nn.Module, count: int) -> list[Batch]:
    """Random inputs and targets; the 16 values of an input are one row, or 4 channels of 4 x 4 of them."""
    stream = torch.Generator().manual_seed(5)
    shape = (5, 4, 4, 4) if isinstance(next(net.children()), nn.Conv2d) else (5, 16)
    x = torch.randn(count, *shape, generator=stream, dtype=torch.float64)
    y = torch.randn(count, 5, *net(x[0].float()).shape[1:], generator=stream, dtype=torch.float64)
    return list(zip(x, y, strict=True))


def seeded(make: Callable[[], nn.Sequential]) -> nn.Sequential:
    torch.manual_seed(4)
    return make()


@dataclass(frozen=True)
class Loader:
    """Gives the batches as they are; a list would mean several loaders to Lightning."""

    batches: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def train(
    module: L.LightningModule, data: Sequence[Batch], *callbacks: L.Callback, **settings: Any
) -> tuple[L.LightningModule, L.Trainer]:
    """One epoch over the batches as they are given."""
    defaults: dict[str, Any] = {"max_epochs": 1, "exact": False, "limit_val_batches": 0}
    trainer = make_trainer(*callbacks, **(defaults | settings))
    trainer.fit(module, Loader(data), Loader(data))
    return module, trainer


class Master(L.Callback):
    """Copies of the dense master after each batch, of each validation's outputs, and of what is folded at the end."""

    def __init__(self) -> None:
        self.masters: list[dict[str, Tensor]] = []
        self.outputs: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.masters.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.outputs.extend([] if outputs is None else [outputs.clone()])


class MasterAtStart(L.Callback):
    """The dense master and the average's, with which training begins, and what the first forward has used."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not hasattr(self, "master"):
            self.master = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            averaged = [c._average_model for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
            self.average = {name: p.detach().clone() for a in averaged for name, p in a.named_parameters()}
            self.used = {n: [t.clone() for t in layer._cached] for n, layer in ops.effective_layers(pl_module)}


class SaveOnce(L.Callback):
    """Saves at one validation, as all of a checkpoint and as weights only, and remembers what the run had then."""

    def __init__(self, folder: Path, epoch: int = 1) -> None:
        self.full, self.weights, self.epoch = folder / "full.ckpt", folder / "weights.ckpt", epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.full)
            trainer.save_checkpoint(self.weights, weights_only=True)
            self.loss = float(trainer.callback_metrics["val/loss"])
            self.master = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            averaged = [c._average_model for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
            self.average = {name: p.detach().clone() for a in averaged for name, p in a.named_parameters()}


def validation_loss(module: L.LightningModule) -> float:
    trainer = make_trainer(exact=False)
    return float(trainer.validate(module, loaders()["val_dataloaders"], verbose=False)[0]["val/loss"])


def is_n_of_m(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """At most n of every m neighbours along the input dimension are not zero."""
    return bool((weight.movedim(1, -1).reshape(-1, m).count_nonzero(1) <= n).all())


def kinds(module: nn.Module) -> list[type]:
    return [type(layer) for layer in module.modules()]


# The references: masks by sorting each group, products by explicit matrices, SGD by its formula.


def sorted_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """True at the n largest |w| of m neighbours along `axis`; among equals the first."""
    rows = weight.movedim(axis, -1).reshape(-1, m)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    for row, values in enumerate(rows.abs().tolist()):
        for place in sorted(range(m), key=lambda place: (-values[place], place))[:n]:
            kept[row, place] = True
    moved = weight.movedim(axis, -1)
    return kept.view(moved.shape).movedim(-1, axis)


TILES = [
    torch.tensor(tile, dtype=torch.bool)
    for tile in itertools.product([row for row in itertools.product([1, 0], repeat=4) if sum(row) == 2], repeat=4)
    if all(sum(column) == 2 for column in zip(*tile, strict=True))
]


def tile_mask(weight: Tensor) -> Tensor:
    """Of the masks with two of four in each row and column of each 4 x 4 tile the one that keeps the most."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for index in itertools.product(*(range(size) for size in weight.shape[2:])):
        for i, j in itertools.product(range(0, weight.shape[0], 4), range(0, weight.shape[1], 4)):
            place = (slice(i, i + 4), slice(j, j + 4), *index)
            mask[place] = max(TILES, key=lambda tile: float(weight[place].abs()[tile].sum()))
    return mask


def both_directions(n: int, m: int) -> MasksOf:
    return lambda weight: (sorted_mask(weight, n, m, 1), sorted_mask(weight, n, m, 0))


def forward_only(n: int, m: int) -> MasksOf:
    return lambda weight: (sorted_mask(weight, n, m, 1),) * 2


def transposable(weight: Tensor) -> tuple[Tensor, Tensor]:
    return (tile_mask(weight),) * 2


class Matrices:
    """A network of linear, convolution, ReLU and flattening layers, trained by hand.

    Args:
        net: its layers and first weights, copied.
        masks: a layer's masks of the forward product and of the input gradient, from its weight.
        dense: indices of layers without masks.
        decay: SR-STE's.
        refresh: steps for which masks stay.
    """

    def __init__(
        self, net: nn.Sequential, masks: MasksOf, *, dense: Sequence[int] = (), decay: float = 0.0, refresh: int = 1
    ) -> None:
        self.net = deepcopy(net).double()
        self.masks_of, self.dense, self.decay, self.refresh = masks, dense, decay, refresh
        self.weights = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.momentum: dict[str, Tensor] = {}
        self.steps = 0

    def masks(self, index: int) -> tuple[Tensor, Tensor]:
        weight = self.weights[f"{index}.weight"]
        return (torch.ones_like(weight, dtype=torch.bool),) * 2 if index in self.dense else self.masks_of(weight)

    def columns(self, index: int, x: Tensor) -> Tensor:
        """[batch, reduction, places]: what the weight as a matrix is multiplied with."""
        layer = self.net[index]
        if isinstance(layer, nn.Linear):
            return x.unsqueeze(-1)
        return F.unfold(x, layer.kernel_size, stride=layer.stride, padding=layer.padding)

    def gradients(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        inputs = []
        for index, layer in enumerate(self.net):
            inputs.append(x)
            if isinstance(layer, nn.ReLU):
                x = x.clamp(min=0)
            elif isinstance(layer, nn.Flatten):
                x = x.flatten(1)
            else:
                used = self.weights[f"{index}.weight"] * self.kept[index][0]
                y = used.flatten(1) @ self.columns(index, x) + self.weights[f"{index}.bias"].unsqueeze(-1)
                x = y.squeeze(-1) if isinstance(layer, nn.Linear) else y.view(len(y), len(used), *self.places(index, x))
        g = 2 * (x - target) / x.numel()
        found = {}
        for index, layer in reversed(list(enumerate(self.net))):
            x = inputs[index]
            if isinstance(layer, nn.ReLU):
                g = g * (x > 0)
            elif isinstance(layer, nn.Flatten):
                g = g.view(x.shape)
            else:
                rows = g.reshape(*g.shape[:2], -1)
                weight = self.weights[f"{index}.weight"]
                dw = (rows @ self.columns(index, x).transpose(1, 2)).sum(0)
                found |= {f"{index}.weight": dw.view(weight.shape), f"{index}.bias": rows.sum((0, 2))}
                dx = (weight * self.kept[index][1]).flatten(1).t() @ rows
                if isinstance(layer, nn.Linear):
                    g = dx.squeeze(-1)
                else:
                    g = F.fold(dx, x.shape[2:], layer.kernel_size, stride=layer.stride, padding=layer.padding)
        return found

    def places(self, index: int, x: Tensor) -> tuple[int, ...]:
        layer = self.net[index]
        sizes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
        return tuple((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)

    def step(self, micro_batches: Sequence[Batch]) -> None:
        layers = [i for i, layer in enumerate(self.net) if isinstance(layer, nn.Linear | nn.Conv2d)]
        if self.steps % self.refresh == 0:
            self.kept = {index: self.masks(index) for index in layers}
        each = [self.gradients(*batch) for batch in micro_batches]
        for name, weight in self.weights.items():
            grad = sum(g[name] for g in each) / len(each)
            if name.endswith("weight"):
                grad = grad + self.decay * weight * ~self.kept[int(name.split(".")[0])][0]
            grad = grad + WEIGHT_DECAY * weight
            self.momentum[name] = MOMENTUM * self.momentum[name] + grad if self.steps else grad
            self.weights[name] = weight - LR * self.momentum[name]
        self.steps += 1

    def train(self, data: Sequence[Batch], accumulate: int = 1) -> Iterator[dict[str, Tensor]]:
        """The dense master after each step."""
        for start in range(0, len(data), accumulate):
            self.step(data[start : start + accumulate])
            yield {f"net.{name}": weight for name, weight in self.weights.items()}
