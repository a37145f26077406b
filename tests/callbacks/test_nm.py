import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conformance.harness import (
    EPOCHS,
    STEPS,
    PlainModule,
    TinyModule,
    assert_same,
    fit,
    loaders,
    make_trainer,
    seed_all,
)
from conformance.test_exact_resume import Setting, resume_everywhere
from conformance.test_never_revived import Alternating, Overflowing
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain import (
    BidirectionalWeightPruning,
    GradualMagnitudePruning,
    OneShot,
    Pruning,
    Selection,
    SparsityCallback,
    StraightThroughNM,
    ops,
)

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 0.02
Batch = tuple[Tensor, Tensor]
MasksOf = Callable[[Tensor], tuple[Tensor, Tensor]]


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


BDWP = BidirectionalWeightPruning
STE = StraightThroughNM
RUNS: list[Any] = [
    pytest.param(mlp, lambda: BDWP(), {"masks": both_directions(2, 4), "dense": [4]}, id="bdwp-mlp"),
    pytest.param(conv_net, lambda: BDWP(), {"masks": both_directions(2, 4)}, id="bdwp-conv"),
    pytest.param(conv_net, lambda: BDWP(1, 4), {"masks": both_directions(1, 4)}, id="bdwp14-conv"),
    pytest.param(
        conv_net, lambda: BDWP(decay=0.05), {"masks": both_directions(2, 4), "decay": 0.05}, id="bdwp-decay-conv"
    ),
    pytest.param(mlp, lambda: STE(1, 4, decay=0.05), {"masks": forward_only(1, 4), "decay": 0.05}, id="sr_ste-mlp"),
    pytest.param(conv_net, lambda: STE(decay=0.05), {"masks": forward_only(2, 4), "decay": 0.05}, id="sr_ste-conv"),
    pytest.param(mlp, lambda: STE(decay=0.0), {"masks": forward_only(2, 4)}, id="ste-mlp"),
    pytest.param(
        mlp,
        lambda: STE(decay=0.05, transposable=True, refresh="3it"),
        {"masks": transposable, "decay": 0.05, "refresh": 3, "dense": [4]},
        id="transposable-mlp",
    ),
    pytest.param(
        conv_net,
        lambda: STE(decay=0.05, transposable=True, refresh="3it"),
        {"masks": transposable, "decay": 0.05, "refresh": 3},
        id="transposable-conv",
    ),
    pytest.param(
        mlp, lambda: STE(decay=0.0, refresh="2it"), {"masks": forward_only(2, 4), "refresh": 2}, id="ste-refresh-mlp"
    ),
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("make", "method", "rules"), RUNS)
def test_a_run_equals_a_loop_written_by_hand(make, method, rules, accumulate):
    net, record, callback = seeded(make), Master(), method()
    data = batches(net, 7 * accumulate)
    reference = Matrices(net, **rules)
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "precision": "64-true"}
    module, _ = train(Regression(net), data, callback, record, **settings)
    for expected, master in zip(
        reference.train(data, accumulate), record.masters[accumulate - 1 :: accumulate], strict=True
    ):
        assert master.keys() == expected.keys()
        for name, weight in master.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-12)
    # The network after the fit is the master's, pruned by the mask of the last forward product to come.
    if reference.steps % reference.refresh == 0:
        reference.kept = {index: reference.masks(index) for index in reference.kept}
    for index, (mask, _) in reference.kept.items():
        weight = reference.weights[f"{index}.weight"] * mask
        torch.testing.assert_close(module.net[index].weight.detach(), weight, rtol=1e-12, atol=1e-12)
        if index not in reference.dense:
            assert torch.equal(callback.masks[f"net.{index}.weight"], mask)


def test_the_input_gradient_is_not_the_derivative_of_the_forward_product():
    net, record = seeded(mlp), Master()
    data = batches(net, 1)
    paper = next(Matrices(net, both_directions(2, 4), dense=[4]).train(data))
    derivative = next(Matrices(net, forward_only(2, 4), dense=[4]).train(data))
    train(Regression(net), data, BDWP(), record, precision="64-true")
    for name, weight in record.masters[0].items():
        torch.testing.assert_close(weight, paper[name], rtol=1e-12, atol=1e-12)
    # Layers above the last one that is sparse in both directions have the same gradients.
    changed = {name for name, weight in paper.items() if (weight - derivative[name]).abs().max() > 1e-4}
    assert changed == {"net.0.weight", "net.0.bias"}


# What the methods avoid, written as users write it.


class DecayInBackward(L.Callback):
    """Adds SR-STE's decay where the original code does: in each backward pass."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for _, layer in ops.effective_layers(pl_module):
            scale = DECAY * ~sorted_mask(layer.weight.detach(), 2, 4, 1)
            layer.weight.register_hook(partial(self.add, layer.weight, scale))

    @staticmethod
    def add(weight: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
        return grad + scale * weight.detach()


class Flat(Regression):
    """Its loss has no slope, so that weights move by their decay alone."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return 0 * super().training_step(batch, batch_idx)


DECAY, SCALE = 0.5, 2.0**10
PITFALLS = [
    pytest.param(
        lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))]},
        1 / SCALE,
        id="scaled_gradients",
    ),
    pytest.param(lambda: {"accumulate_grad_batches": 3}, 3.0, id="accumulation"),
    pytest.param(lambda: {"gradient_clip_val": 0.01}, None, id="clip_norm"),
    pytest.param(lambda: {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}, None, id="clip_value"),
]


def moves(method: L.Callback, *callbacks: L.Callback, **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """By how much the weights move in one step without slope, and lr * decay * (1 - mask) * weight."""
    net, record = seeded(mlp), Master()
    before = [layer.weight.detach().clone() for layer in net if isinstance(layer, nn.Linear)][:2]
    data = [(x.float(), y.float()) for x, y in batches(net, settings.get("accumulate_grad_batches", 1))]
    train(Flat(net, momentum=0.0, weight_decay=0.0), data, method, record, *callbacks, **settings)
    after = [record.masters[-1][f"net.{index}.weight"] for index in (0, 2)]
    pruned = [LR * DECAY * weight * ~sorted_mask(weight, 2, 4, 1) for weight in before]
    return [(old - new, due) for old, new, due in zip(before, after, pruned, strict=True)]


@pytest.mark.parametrize("method", [BDWP, STE])
@pytest.mark.parametrize(("settings", "factor"), PITFALLS)
def test_the_decay_enters_once_unscaled_and_unclipped(method, settings, factor):
    for moved, due in moves(method(decay=DECAY), **settings()):
        assert due.abs().max() > 1e-3
        torch.testing.assert_close(moved, due, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("settings", "factor"), PITFALLS)
def test_a_decay_within_backward_is_scaled_repeated_or_clipped(settings, factor):
    for moved, due in moves(STE(decay=0.0), DecayInBackward(), **settings()):
        if factor is None:
            assert moved.abs().max() < 0.2 * due.abs().max()
        else:
            torch.testing.assert_close(moved, factor * due, rtol=1e-3, atol=1e-7)


def test_gradients_themselves_are_clipped_as_without_the_method():
    def trained(*callbacks: L.Callback) -> dict[str, Tensor]:
        record = Master()
        train(Regression(seeded(mlp)), data, *callbacks, record, precision="64-true", gradient_clip_val=1e-3)
        return record.masters[0]

    data = batches(mlp(), 1)
    net = seeded(mlp)
    reference = Matrices(net, both_directions(2, 4), dense=[4])
    reference.kept = {index: reference.masks(index) for index in (0, 2, 4)}
    grads = reference.gradients(*data[0])
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    master = trained(BDWP(decay=DECAY))
    for name, grad in grads.items():
        weight = reference.weights[name]
        decay = DECAY * weight * ~reference.kept[int(name[0])][0] if name.endswith("weight") else 0
        expected = weight - LR * (grad * (1e-3 / (norm + 1e-6)) + decay + WEIGHT_DECAY * weight)
        torch.testing.assert_close(master[f"net.{name}"], expected, rtol=1e-12, atol=1e-12)


class MadeOnce(BidirectionalWeightPruning):
    """Makes effective weights at the start only."""

    def apply(self) -> None:
        if not self.step:
            super().apply()


def test_effective_weights_that_outlive_a_step_train_another_network():
    net = seeded(mlp)
    data = batches(net, 3)
    expected = list(Matrices(net, both_directions(2, 4), dense=[4]).train(data))
    stale, fresh = Master(), Master()
    train(Regression(deepcopy(net)), data, MadeOnce(), stale, precision="64-true")
    train(Regression(deepcopy(net)), data, BDWP(), fresh, precision="64-true")

    def equal(record: Master, step: int) -> bool:
        return all(
            torch.allclose(record.masters[step][name], w, rtol=0, atol=1e-9) for name, w in expected[step].items()
        )

    assert [equal(stale, step) for step in range(3)] == [True, False, False]
    assert [equal(fresh, step) for step in range(3)] == [True, True, True]


class NotMadeAtValidation(BidirectionalWeightPruning):
    """Keeps the effective weights of the live master when averages take its place."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass


def validated_average(method: L.Callback) -> tuple[Master, Tensor]:
    """What a run with averaging did, and what the average's N:M network gives at its only validation."""
    net, record, average = seeded(mlp), Master(), {}
    data = batches(net, 4)
    plain = deepcopy(net).double()
    averaging = EMAWeightAveraging(decay=0.6)  # which copies the module while it is still float32
    train(Regression(net), data, method, averaging, record, precision="64-true", limit_val_batches=1)
    average = record.masters[0]
    for master in record.masters[1:]:
        average = {name: 0.6 * average[name] + 0.4 * weight for name, weight in master.items()}
    used = {name.removeprefix("net."): weight for name, weight in average.items()}
    for name in ("0.weight", "2.weight"):
        used[name] = used[name] * sorted_mask(used[name], 2, 4, 1)
    return record, torch.func.functional_call(plain, used, (data[0][0],)).detach()


def test_validation_of_an_average_uses_the_weights_that_follow_from_the_average():
    record, expected = validated_average(BDWP())
    torch.testing.assert_close(record.outputs[-1], expected, rtol=1e-5, atol=1e-6)
    naive, expected = validated_average(NotMadeAtValidation())
    assert (naive.outputs[-1] - expected).abs().max() > 1e-3


class CountWrites(L.Callback):
    """Counts how often rules write or make effective weights, by batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written, self.made, self.by_batch = 0, 0, []
        write, weights = ops.NMRule.write_, ops.NMRule.weights

        def count_write(*arguments: Any, **settings: Any) -> None:
            self.written += 1
            write(*arguments, **settings)

        def count_weights(*arguments: Any, **settings: Any) -> Any:
            self.made += 1
            return weights(*arguments, **settings)

        monkeypatch.setattr(ops.NMRule, "write_", count_write)
        monkeypatch.setattr(ops.NMRule, "weights", count_weights)

    def on_train_batch_start(self, *_: Any) -> None:
        self.by_batch.append(self.written)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [BDWP, STE, partial(STE, transposable=True, refresh="2it")])
def test_effective_weights_are_made_once_per_optimizer_step(monkeypatch, method, precision):
    count, layers = CountWrites(monkeypatch), 3 if method is STE else 2
    data = [(x.float(), y.float()) for x, y in batches(mlp(), 9)]
    train(Regression(mlp()), data, method(), count, accumulate_grad_batches=3, precision=precision)
    assert [after - before for before, after in itertools.pairwise(count.by_batch)] == [0, 0, layers] * 2 + [0, 0]
    assert count.made == 0


def test_under_bfloat16_autocast_a_step_equals_the_one_without_kept_weights():
    class Uncached(BidirectionalWeightPruning):
        def apply(self) -> None:
            for layer in self._layers.values():
                layer.forget()

    class Dtypes(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.found = {t.dtype for _, layer in ops.effective_layers(pl_module) for t in layer._cached or ()}

    net = seeded(conv_net)
    data = [(x.float(), y.float()) for x, y in batches(net, 3)]
    dtypes, kept, uncached = Dtypes(), Master(), Master()
    train(Regression(deepcopy(net)), data, BDWP(decay=0.1), kept, dtypes, precision="bf16-mixed")
    assert dtypes.found == {torch.bfloat16}
    train(Regression(deepcopy(net)), data, Uncached(decay=0.1), uncached, dtypes, precision="bf16-mixed")
    assert dtypes.found == set()
    assert_same(kept.masters, uncached.masters)


# Checkpoints.


def is_n_of_m(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """At most n of every m neighbours along the input dimension are not zero."""
    return bool((weight.movedim(1, -1).reshape(-1, m).count_nonzero(1) <= n).all())


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


class MasterAtStart(L.Callback):
    """The dense master and the average's, with which training begins."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not hasattr(self, "master"):
            self.master = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            averaged = [c._average_model for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
            self.average = {name: p.detach().clone() for a in averaged for name, p in a.named_parameters()}
            self.used = {n: [t.clone() for t in layer.effective()] for n, layer in ops.effective_layers(pl_module)}
            self.cached = all(layer._cached is not None for _, layer in ops.effective_layers(pl_module))


def validation_loss(module: L.LightningModule) -> float:
    trainer = make_trainer(exact=False)
    return float(trainer.validate(module, loaders()["val_dataloaders"], verbose=False)[0]["val/loss"])


METHODS = [
    pytest.param(partial(BDWP, decay=0.01), id="bdwp"),
    pytest.param(partial(STE, decay=0.01), id="sr_ste"),
    pytest.param(partial(STE, transposable=True, refresh="4it"), id="transposable"),
]


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_the_sparse_network_that_validation_saw(tmp_path, method, averaged):
    saver, averaging = SaveOnce(tmp_path), [EMAWeightAveraging(decay=0.5)] * averaged
    fit(method(), *averaging, saver)
    for path in (saver.full,) if averaged else (saver.full, saver.weights):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert is_n_of_m(state["body.5.weight"])
        plain = TinyModule()
        plain.load_state_dict(state, strict=True)
        assert validation_loss(plain) == saver.loss
        assert validation_loss(TinyModule.load_from_checkpoint(path)) == saver.loss


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("method", METHODS)
def test_the_callbacks_state_restores_the_master_bit_for_bit(tmp_path, method, averaged):
    def callbacks() -> list[L.Callback]:
        return [method(), *[EMAWeightAveraging(decay=0.5)] * averaged]

    saver, start = SaveOnce(tmp_path), MasterAtStart()
    fit(*callbacks(), saver)
    assert not is_n_of_m(saver.master["body.5.weight"])
    fit(*callbacks(), start, ckpt_path=saver.full)
    assert start.cached
    assert_same(start.master, saver.master)
    assert_same(start.average, saver.average)
    state = torch.load(saver.full, weights_only=True)
    saved = state["current_model_state" if averaged else "state_dict"]
    for name, (forward, _) in start.used.items():
        assert torch.equal(forward, saved[f"{name}.weight"])


def test_a_checkpoint_adds_the_pruned_values_and_one_bit_a_weight_for_each_mask(tmp_path):
    def size(path: Path) -> int:
        return path.stat().st_size

    class Wide(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.body[5], self.head = nn.Linear(64, 512), nn.Linear(512, 3)

    sparse, dense = SaveOnce(tmp_path / "sparse"), SaveOnce(tmp_path / "dense")
    fit(BDWP(), sparse, make=Wide)
    fit(dense, make=Wide)
    weights = 64 * 512
    assert size(sparse.full) - size(dense.full) < weights * 4 / 2 + 2 * weights / 8 + 4000
    assert abs(size(sparse.weights) - size(dense.weights)) < 1000


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the checkpoint callback, left out
def test_a_checkpoint_of_the_end_of_the_fit_continues_with_the_master(tmp_path):
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_epochs=10)
    full, start, short = Master(), MasterAtStart(), Master()
    fit(BDWP(), full, max_epochs=4, make=PlainModule)
    run = fit(BDWP(), short, last, make=PlainModule)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert (tmp_path / "last.ckpt").exists()
    for name in ("last.ckpt", "after.ckpt"):
        state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        assert is_n_of_m(state["body.5.weight"])
        start, again = MasterAtStart(), Master()
        fit(BDWP(), start, again, max_epochs=4, make=PlainModule, ckpt_path=tmp_path / name)
        assert_same(start.master, short.masters[-1])
        assert_same(again.masters, full.masters[STEPS:])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_amid_accumulation_it_resumes_bit_identically(tmp_path, method):
    assert not resume_everywhere(
        tmp_path, lambda: [method()], Setting("accumulate", trainer={"accumulate_grad_batches": 2})
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [*METHODS, pytest.param(partial(STE, refresh="4it", decay=0.1), id="sr_ste_refresh")]
)
def test_with_weight_averaging_it_resumes_bit_identically(tmp_path, method):
    def make() -> list[L.Callback]:
        return [method(), EMAWeightAveraging(decay=0.5)]

    assert not resume_everywhere(tmp_path, make, moments=lambda saved: saved.batches in (6, 10, 11))


# What is left behind.


def kinds(module: nn.Module) -> list[type]:
    return [type(layer) for layer in module.modules()]


@pytest.mark.parametrize("method", METHODS)
def test_after_the_fit_layers_are_plain_and_hold_exactly_n_of_m(method):
    run = fit(method(), make=PlainModule)
    assert kinds(run.module) == kinds(PlainModule())
    for name, mask in run.callback.masks.items():
        weight = run.module.get_parameter(name)
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
        assert not weight[~mask].any()
        assert weight[mask].all()  # which random weights are, so that the zeros show the mask
    assert set(vars(run.module)) == set(vars(fit(make=PlainModule).module))


class Fails(L.Callback):
    """Raises when as many batches have been made."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            raise RuntimeError("as arranged")


class KeepOnException(OnExceptionCheckpoint):
    """Lightning's removes its file at once if the same Trainer is torn down."""

    def teardown(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path")  # Lightning's, whenever that checkpoint is listed
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_leaves_the_plain_layers_the_master_and_a_checkpoint_that_resumes(tmp_path, method):
    full, module = Master(), PlainModule()
    fit(method(), full, make=PlainModule)
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(method(), Fails(7), KeepOnException(tmp_path), make=lambda: module.__init__() or module)
    assert kinds(module) == kinds(PlainModule())
    assert_same({name: p.detach() for name, p in module.named_parameters()}, full.masters[6])
    again = Master()
    fit(method(), again, make=PlainModule, ckpt_path=tmp_path / "on_exception.ckpt")
    assert_same(again.masters, full.masters[7:])


class Late(PlainModule):
    """Makes its layers when a Trainer asks for them, once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.body, self.head
        self.body = self.head = None
        self.made = 0

    def configure_model(self) -> None:
        if self.body is None:
            self.body, self.head = self.parts
            self.made += 1


def test_layers_that_configure_model_makes_are_converted_and_given_back():
    seen = []

    class See(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append([type(layer) for _, layer in ops.effective_layers(pl_module)])

    run = fit(BDWP(), See(), make=Late)
    eager = fit(BDWP(), make=PlainModule)
    assert seen == [[ops.EffectiveLinear]]
    assert_same(dict(run.module.named_parameters()), dict(eager.module.named_parameters()))
    assert "configure_model" not in vars(run.module)
    assert kinds(run.module) == kinds(PlainModule()) or kinds(run.module)[1:] == kinds(PlainModule())[1:]
    make_trainer(BDWP(), See()).fit(run.module, **loaders())
    assert (seen, run.module.made) == ([[ops.EffectiveLinear]] * 2, 1)
    assert is_n_of_m(run.module.body[5].weight)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_an_average_of_late_layers_is_one_of_converted_layers():
    run = fit(BDWP(), EMAWeightAveraging(decay=0.5), make=Late)
    eager = fit(BDWP(), EMAWeightAveraging(decay=0.5), make=PlainModule)
    assert_same(dict(run.module.named_parameters()), dict(eager.module.named_parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_a_second_fit_with_the_same_callback_equals_a_first_one(method):
    def refit(callback: L.Callback, module: L.LightningModule) -> dict[str, Tensor]:
        seed_all(5)
        make_trainer(callback).fit(module, **loaders())
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    run = fit(method(), make=PlainModule)
    copy = deepcopy(run.module)
    assert_same(refit(run.callback, run.module), refit(method(), copy))


class Mixed(nn.Module):
    """One layer of each kind that has a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)


def plan_of(method: SparsityCallback, net: nn.Module) -> dict[str, tuple[bool, str]]:
    """The plan at the start of a fit, without training."""
    module, trainer = Regression(net), SimpleNamespace(callbacks=[method], strategy=None)
    method.setup(trainer, module, "fit")
    rows = {row.name: (row.pruned, row.reason) for row in method.plan}
    method.undo(module)
    return rows


def test_the_plan_says_of_each_parameter_what_it_computes_with_or_why_it_stays_dense():
    both, forward = plan_of(BDWP(), Mixed()), plan_of(STE(1, 4), Mixed())
    fused = "attention projection: nn.MultiheadAttention multiplies it without calling a layer"
    expected = {
        "net.embed.weight": (False, "embedding: name it in `include`"),
        "net.stem.weight": (False, "3 input channels are not divisible by 4"),
        "net.deep.weight": (False, "depthwise convolution: name it in `include`"),
        "net.norm.weight": (False, "no maskable weight (LayerNorm)"),
        "net.attend.in_proj_weight": (False, fused),
        "net.attend.out_proj.weight": (False, fused),
        "net.fc.weight": (True, "2:4 in both directions"),
        "net.fc.bias": (False, "bias"),
        "net.head.weight": (False, "10 output channels are not divisible by 4"),
    }
    assert {name: both[name] for name in expected} == expected
    assert forward["net.head.weight"] == forward["net.fc.weight"] == (True, "1:4 in the forward product")
    left_out = plan_of(
        BDWP(where=Selection(exclude=("*fc*",), include=("*.weight",))), nn.Sequential(nn.Linear(8, 8), Mixed())
    )
    assert left_out["net.1.fc.weight"] == (False, "excluded by '*fc*'")


def test_the_plan_is_printed_once(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(BDWP(), make=PlainModule)
    messages = {
        record.getMessage() for record in caplog.records if "BidirectionalWeightPruning:" in record.getMessage()
    }
    assert len(messages) == 1
    assert "3 output channels are not divisible by 4" in messages.pop()


# Refusals.


class Manual(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fused(PlainModule):
    """Its optimizer unscales gradients within its step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


class HeadOnly(PlainModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BDWP(decay=-0.1), r"^decay is -0.1; it must be at least 0\.$"),
        (lambda: STE(decay=math.nan), r"^decay is nan; it must be at least 0\.$"),
        (
            lambda: BDWP(4, 2),
            r"^n=4 of m=2 must satisfy 1 <= n < m <= 64\. Common choices: 2 of 4, 1 of 4, 2 of 8, 4 of 8\.$",
        ),
        (
            lambda: STE(4, 8, transposable=True),
            r"^Transposable 4:8 masks are found by enumeration, for m <= 5 only\. Take n=2, m=4\.$",
        ),
        (lambda: STE(refresh="four"), r"^refresh: 'four'"),
        (lambda: BDWP(where=Selection(include="body.*")), r"^include='body\.\*' is one string"),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SCALED = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
REFUSALS = [
    pytest.param(
        lambda: [BDWP(decay=0.5)],
        {"make": Manual},
        r"^decay=0\.5 is added after gradients are clipped, which a module under manual optimization does itself\. "
        r"Use decay=0\.0 there, or automatic optimization\.$",
        id="manual_optimization",
    ),
    pytest.param(
        lambda: [STE()],
        {"make": Fused} | SCALED,
        r"^SGD unscales gradients within its step \(fused\), so that decay=0\.0002 would be divided by the scale\. "
        r"Use fused=False, precision='bf16-mixed' or decay=0\.0\.$",
        id="fused_under_a_scaler",
    ),
    pytest.param(
        lambda: [EMAWeightAveraging(), BDWP()],
        {},
        r"^EMAWeightAveraging has copied the module before BidirectionalWeightPruning could convert its layers\. "
        r"List it after BidirectionalWeightPruning\.$",
        id="averaging_first",
    ),
    pytest.param(
        lambda: [BDWP(where=Selection(include=("head.*",)))],
        {},
        r"^No layer of PlainModule can hold 2:4 in both directions: .*head\.weight: 3 output channels are not "
        r"divisible by 4.*\. Choose others in `where`\.$",
        id="nothing_fits",
    ),
    pytest.param(lambda: [STE(refresh="0it")], {}, r"^refresh='0it' is less than one step\.$", id="refresh"),
    pytest.param(
        lambda: [BDWP(), STE(where=Selection(include=("head.*",)))],
        {},
        r"^BidirectionalWeightPruning and StraightThroughNM would both convert layers of this module, which goes with "
        r"one N:M callback\. Remove one of them\.$",
        id="two_of_them",
    ),
    pytest.param(
        lambda: [BDWP()],
        {"make": HeadOnly},
        r"^No optimizer holds any of the N:M weights\. Return one from configure_optimizers\.$",
        id="no_optimizer",
    ),
    pytest.param(
        lambda: [BDWP(), GradualMagnitudePruning(OneShot(0.5, at=2))],
        {},
        r"^'body\.5\.weight' is pruned by two callbacks, \w+ and \w+\. "
        r"Give them selections without a common parameter\.$",
        id="pruned_too",
    ),
    pytest.param(
        lambda: [GradualMagnitudePruning(OneShot(0.5, at=2)), BDWP()],
        {},
        r"^'body\.5\.weight' is pruned by two callbacks",
        id="pruned_too_first",
    ),
]


@pytest.mark.parametrize(("callbacks", "settings", "message"), REFUSALS)
def test_what_cannot_go_well_is_refused_before_the_first_step_and_leaves_plain_layers(callbacks, settings, message):
    module = settings.get("make", PlainModule)()
    with pytest.raises(ValueError, match=message):
        fit(*callbacks(), **(settings | {"make": lambda: module}))
    assert kinds(module) == kinds(type(module)())
    assert {"configure_gradient_clipping", "configure_model"}.isdisjoint(vars(module))


def test_the_same_without_a_decay_is_not_refused():
    fit(STE(decay=0.0), make=Fused, max_epochs=1, **SCALED)


def test_it_goes_with_gradual_pruning_of_other_layers():
    gradual = GradualMagnitudePruning(
        OneShot(0.5, at=2), pruning=Pruning(Selection(include=("body.0.weight", "head.*")))
    )
    run = fit(BDWP(), gradual, make=PlainModule)
    assert is_n_of_m(run.module.body[5].weight)
    assert sum(int((run.module.get_parameter(n) == 0).sum()) for n in gradual.masks) == (36 + 48) // 2


def test_a_checkpoint_with_an_average_is_not_resumed_without_it(tmp_path):
    saver = SaveOnce(tmp_path)
    fit(BDWP(), EMAWeightAveraging(decay=0.5), saver)
    with (
        pytest.warns(UserWarning, match="Please add the following callbacks"),
        pytest.raises(
            ValueError,
            match=r"^The checkpoint holds a copy of the weights that no callback has now: EMAWeightAveraging\."
            r"_average_model\. Resume a run with the callbacks it was trained with\.$",
        ),
    ):
        fit(BDWP(), ckpt_path=saver.full)


# The Trainer's other ways of running.


@pytest.mark.parametrize("method", METHODS)
def test_validation_and_test_after_the_fit_use_the_folded_module(method):
    run = fit(method(), make=PlainModule)
    expected = validation_loss(deepcopy(run.module))
    found = run.trainer.validate(run.module, loaders()["val_dataloaders"], verbose=False)
    assert found[0]["val/loss"] == expected
    assert run.trainer.test(run.module, loaders()["val_dataloaders"], verbose=False)[0]["test/loss"] == expected
    assert kinds(run.module) == kinds(PlainModule())


def test_a_checkpoint_is_tested_with_the_callback_attached(tmp_path):
    saver = SaveOnce(tmp_path)
    fit(BDWP(), saver)
    trainer = make_trainer(BDWP(), exact=True)
    found = trainer.test(TinyModule(), loaders()["val_dataloaders"], ckpt_path=saver.full, verbose=False)
    assert found[0]["test/loss"] == saver.loss


def test_a_fast_development_run_leaves_n_of_m():
    run = fit(BDWP(decay=0.1), make=PlainModule, fast_dev_run=True)
    assert run.callback.step == 1
    assert is_n_of_m(run.module.body[5].weight)


class Checkpointed(Regression):
    """Computes its activations again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [partial(BDWP, decay=0.1), partial(STE, transposable=True, refresh="2it")])
def test_activation_checkpointing_changes_nothing(method, precision):
    net, once, twice = seeded(conv_net), Master(), Master()
    data = [(x.float(), y.float()) for x, y in batches(net, 4)]
    train(Regression(deepcopy(net)), data, method(), once, precision=precision, accumulate_grad_batches=2)
    train(Checkpointed(deepcopy(net)), data, method(), twice, precision=precision, accumulate_grad_batches=2)
    assert_same(once.masters, twice.masters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it in `log`
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_module_trains_the_same_network(method):
    def trained(make: Callable[[], L.LightningModule]) -> dict[str, Tensor]:
        run = fit(method(), make=make)
        module = getattr(run.module, "_orig_mod", run.module)
        assert kinds(module) == kinds(PlainModule())
        return dict(module.named_parameters())

    torch.compiler.reset()
    compiled = trained(lambda: torch.compile(PlainModule(), backend="aot_eager"))
    for name, parameter in trained(PlainModule).items():
        torch.testing.assert_close(compiled[name], parameter, rtol=1e-4, atol=1e-5)


class Fresh(L.Callback):
    """Asserts before each batch that the weights made are those of the present master."""

    def __init__(self) -> None:
        self.looked = 0

    def look(self, pl_module: L.LightningModule) -> None:
        for _, layer in ops.effective_layers(pl_module):
            weight = layer.weight.detach()
            for made, axis in zip(layer._cached, (1, 0), strict=True):
                assert torch.equal(made, (weight * sorted_mask(weight, 2, 4, axis)).to(made.dtype))
                self.looked += 1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(pl_module)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(pl_module)


class SeveralClosures(PlainModule):
    """Its optimizer evaluates the loss several times a step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        (list, {}),
        (list, {"make": Alternating}),
        (list, {"make": Overflowing} | SCALED),
        (list, {"val_check_interval": 2}),
        (lambda: [EMAWeightAveraging(decay=0.5)], {"val_check_interval": 2}),
        (lambda: [EMAWeightAveraging(decay=0.5)], {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}),
        (lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)], {}),
    ],
    ids=["plain", "two_optimizers", "skipped_step", "validation_within", "ema", "ema_accumulate", "swa"],
)
def test_the_weights_in_use_are_always_those_of_the_present_master(callbacks, settings):
    fresh = Fresh()
    fit(BDWP(), *callbacks(), fresh, **({"make": PlainModule} | settings))
    assert fresh.looked >= 2 * (STEPS + EPOCHS)


@pytest.mark.parametrize("method", [partial(BDWP, decay=0.1), partial(STE, refresh="2it", decay=0.1)])
def test_an_optimizer_that_evaluates_the_loss_several_times_a_step_sees_the_weights_it_has_moved(method):
    class Uncached(method.func):
        def apply(self) -> None:
            for layer in self._layers.values():
                layer.forget()

    kept, uncached = Master(), Master()
    fit(method(), kept, make=SeveralClosures)
    fit(Uncached(**method.keywords), uncached, make=SeveralClosures)
    assert_same(kept.masters, uncached.masters)


@pytest.mark.parametrize("moment", ["setup", "on_fit_start", "on_sanity_check_start", "on_validation_start"])
def test_an_exception_at_any_moment_leaves_plain_layers_and_the_master(moment):
    def raises(*_: Any, **__: Any) -> None:
        raise RuntimeError("as arranged")

    failing, module = L.Callback(), PlainModule()
    setattr(failing, moment, raises)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(BDWP(), failing, make=lambda: module, num_sanity_val_steps=2)
    assert kinds(module) == kinds(PlainModule())
    if moment != "on_validation_start":
        assert_same({name: p.detach() for name, p in module.named_parameters()}, before)
    assert not is_n_of_m(module.body[5].weight)


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
def test_with_stochastic_weight_averaging_it_resumes_with_the_same_masters(tmp_path):
    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)

    saver, full, again = SaveOnce(tmp_path, epoch=0), Master(), Master()
    fit(BDWP(), averaging(), full, saver, make=PlainModule)
    fit(BDWP(), averaging(), again, make=PlainModule, ckpt_path=saver.full)
    assert_same(again.masters, full.masters[STEPS // EPOCHS :])


class Rated(PlainModule):
    lr = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("method", METHODS)
def test_the_tuner_gives_back_plain_layers_and_the_first_weights(tmp_path, method):
    module, trainer = Rated(), make_trainer(method(), exact=False, default_root_dir=tmp_path)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    Tuner(trainer).lr_find(module, **loaders(), num_training=8, update_attr=False)
    assert kinds(module) == kinds(Rated())
    assert_same({name: p.detach() for name, p in module.named_parameters()}, before)
    trainer.fit(module, **loaders())
    assert is_n_of_m(module.body[5].weight)


def test_a_module_saved_after_an_exception_is_dense_and_resumes(tmp_path):
    full, again, module = Master(), Master(), PlainModule()
    fit(BDWP(), full, make=PlainModule)
    trainer = make_trainer(BDWP(), Fails(7))
    seed_all(3)
    module = PlainModule()
    with pytest.raises(RuntimeError, match="as arranged"):
        trainer.fit(module, **loaders())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    fit(BDWP(), again, make=PlainModule, ckpt_path=tmp_path / "late.ckpt")
    assert_same(again.masters, full.masters[7:])


@pytest.mark.parametrize("method", METHODS)
def test_a_callback_that_refers_to_a_part_of_the_module_keeps_no_second_master(tmp_path, method):
    class Refers(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.part, self.copy = pl_module.body, deepcopy(pl_module.body)

    saver, full, again = SaveOnce(tmp_path), Master(), Master()
    callback = method()
    fit(callback, Refers(), saver, full, make=PlainModule)
    state = torch.load(saver.full, weights_only=True)["callbacks"][callback.state_key]
    assert [key.split(".")[-1] for key in state["shadow"]] == ["", "copy"]
    fit(method(), Refers(), again, make=PlainModule, ckpt_path=saver.full)
    assert_same(again.masters, full.masters[2 * STEPS // EPOCHS :])
