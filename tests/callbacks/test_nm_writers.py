"""N:M training beside whatever else writes or reads weights: hooks, averages by hand, several optimizers, finders."""

import warnings
from copy import deepcopy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from callbacks.nm_network import (
    BDWP,
    STE,
    Batch,
    Regression,
    batches,
    is_n_of_m,
    mlp,
    seeded,
    sorted_mask,
    train,
)
from callbacks.test_follower import scaled
from conformance.harness import STEPS, PlainModule, fit
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn

from sparsetrain import FixedMasks

METHODS = [BDWP, STE, partial(STE, transposable=True, refresh="2it")]


class Net(Regression):
    """The network of `mlp` in float32."""

    def __init__(self) -> None:
        super().__init__(seeded(mlp))


def data(count: int) -> list[Batch]:
    return [(x.float(), y.float()) for x, y in batches(mlp(), count)]


def by_hand(net: nn.Sequential, x: Tensor) -> Tensor:
    """What the network gives with 2:4 weights that are made now, in its first two layers."""
    used = {name: p.detach().clone() for name, p in net.named_parameters()}
    for name in ("0.weight", "2.weight"):
        used[name] *= sorted_mask(used[name], 2, 4, 1)
    return torch.func.functional_call(deepcopy(seeded(mlp)), used, (x,))


class Clamps(Net):
    """Clamps its weights after each batch, by their data, as critics of GANs do."""

    def on_train_batch_end(self, *_: Any) -> None:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.02, 0.02)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.testing.assert_close(self(batch[0]), by_hand(self.net, batch[0]))
        return super().training_step(batch, batch_idx)


class Momentum(Net):
    """Has a second network that follows the first, which no optimizer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.follower = deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        target = self.follower(batch[0])
        torch.testing.assert_close(target, by_hand(self.follower, batch[0]))
        return super().training_step((batch[0], target + batch[1]), batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        for theirs, ours in zip(self.follower.parameters(), self.net.parameters(), strict=True):
            theirs.data = theirs.data.lerp(ours.data, 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.5)


class Swaps(Net):
    """Validates other weights than it trains, by its own hooks."""

    def on_validation_epoch_start(self) -> None:
        self.kept = [p.detach().clone() for p in self.net.parameters()]
        for parameter in self.net.parameters():
            parameter.data.mul_(-3)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.testing.assert_close(self(batch[0]), by_hand(self.net, batch[0]))
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        for parameter, kept in zip(self.net.parameters(), self.kept, strict=True):
            parameter.data.copy_(kept)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.testing.assert_close(self(batch[0]), by_hand(self.net, batch[0]))
        return super().training_step(batch, batch_idx)


class Copies(Net):
    """Averages a copy that it takes in the middle of training."""

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.average = [deepcopy(self.net)]  # in a list: no part of the module
        for theirs, ours in zip(self.average[0].parameters(), self.net.parameters(), strict=True):
            theirs.data.lerp_(ours.data, 0.5)
        torch.testing.assert_close(self.average[0](batch[0]), by_hand(self.average[0], batch[0]))


@pytest.mark.filterwarnings("ignore:.*is in no optimizer now")
@pytest.mark.parametrize("make", [Clamps, Momentum, Swaps, Copies])
def test_what_a_module_writes_into_its_weights_is_multiplied_at_once(make):
    module, _ = train(make(), data(6), BDWP(), limit_val_batches=2, val_check_interval=3)
    assert is_n_of_m(module.net[0].weight)


class AtOnce(L.LightningModule):
    """Two networks; both losses are there before the first of the optimizers steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = seeded(mlp), seeded(mlp)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        parts = [(self.one, self.optimizers()[0]), (self.other, self.optimizers()[1])]
        losses = [F.mse_loss(net(batch[0]), batch[1]) for net, _ in parts]
        for loss, (_, optimizer) in zip(losses, parts, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.other)]


@pytest.mark.parametrize("method", [BDWP, STE])
def test_two_optimizers_may_step_after_both_losses_are_computed(method):
    module, _ = train(AtOnce(), data(4), method(decay=0.0))
    alone, _ = train(Regression(seeded(mlp), momentum=0.0, weight_decay=0.0), data(4), method(decay=0.0))
    for net in (module.one, module.other):
        for ours, theirs in zip(net.parameters(), alone.net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


class Nested(torch.optim.SGD):
    """Its step calls that of the class above, whose hooks run as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Replaces(Net):
    """Takes another optimizer in the middle of training."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Nested(self.parameters(), lr=0.1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 3:
            self.trainer.strategy.optimizers = [torch.optim.Adam(self.parameters(), lr=0.1)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.testing.assert_close(self(batch[0]), by_hand(self.net, batch[0]))
        return super().training_step(batch, batch_idx)


def test_steps_of_nested_and_of_later_optimizers_count_once():
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from here on hooks run in its step, too
    callback = BDWP(decay=0.1)
    module, trainer = train(Replaces(), data(7), callback)
    assert callback.step == 7
    assert is_n_of_m(module.net[0].weight)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


class ReplacesInTail(Replaces):
    """The same; it may compute with the master."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return Net.training_step(self, batch, batch_idx)


def test_steps_of_a_later_optimizer_count_in_a_dense_tail():
    callback = BDWP(sparse_until="2it")
    train(ReplacesInTail(), data(7), callback)
    assert callback.step == 7


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_is_skipped_does_not_count(fused):
    assert scaled(BDWP(decay=0.0), 1, fused=fused).callback.step == STEPS - 1


class PassesBy(Net):
    """Multiplies a layer's weight without calling the layer, as some attention blocks do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[1:](F.linear(x, self.net[0].weight, self.net[0].bias))


def test_of_a_layer_that_the_module_does_not_call_it_warns_once_after_the_first_step():
    class Counts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.warned = [*getattr(self, "warned", []), len(caught)]

    torch._dynamo.utils.counters.clear()  # of other tests, after which nothing is warned of
    counts = Counts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(PassesBy(), data(3), counts, BDWP())
    (message,) = [str(w.message) for w in caught if "gradient" in str(w.message)]
    assert message.startswith("'net.0.weight' has a gradient, but its layer was not called in the first step.")
    assert counts.warned[1] == counts.warned[2]


class InSetup(Net):
    """Makes its last layer when the data is known."""

    def setup(self, stage: str) -> None:
        self.net[-1] = nn.Linear(self.net[-1].in_features, self.net[-1].out_features)
        self.extra = nn.Linear(8, 8)


def test_a_layer_that_is_made_in_setup_is_warned_of_and_is_in_the_plan():
    callback = BDWP()
    with pytest.warns(UserWarning, match=r"The layers of extra\.weight were made after BidirectionalWeightPruning had"):
        train(InSetup(), data(3), callback)
    assert [row.reason for row in callback.plan if row.name == "extra.weight"] == ["made after the conversion"]


class Direct(Net):
    """Calls forward methods, not layers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer.forward(x)
        return x


@torch.compile(backend="eager")
def called(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


class InFunction(Net):
    """Calls its layers in a compiled function."""

    def forward(self, x: Tensor) -> Tensor:
        return called(self.net, x)


makes = [Direct, lambda: _compiled(Net()), InFunction]


@pytest.mark.parametrize("make", makes, ids=["forward_methods", "compiled", "function"])
def test_a_layer_that_computes_is_called_in_each_fit(make):
    module = make()
    for _ in range(2):  # warnings are errors here
        train(module, data(3), BDWP(), num_sanity_val_steps=0)
        assert is_n_of_m(module.net[0].weight)


def _compiled(module: Net) -> Net:
    module.net.compile(backend="eager")
    return module


class Raw(Net):
    """Steps its optimizer behind the back of Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_steps_that_lightning_does_not_see_count():
    callback = STE(decay=0.0, refresh="2it", sparse_until=4)
    train(Raw(), data(6), callback)
    assert callback.step == 6
    fixed = FixedMasks({"net.0.weight": torch.rand(12, 16) < 0.5}, check="off")
    train(Raw(), data(6), fixed)
    assert fixed.step == 6


class Sometimes(Net):
    """Calls one of its layers in validation, and from the second batch on; a penalty gives it a gradient always."""

    def forward(self, x: Tensor) -> Tensor:
        skips = self.training and self.global_step == 0
        return self.net[4](self.net[3](x[:, :8] if skips else self.net[:3](x)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.net.parameters())


def test_a_layer_that_validation_has_called_may_rest_in_the_first_step():
    module, _ = train(Sometimes(), data(3), BDWP(), limit_val_batches=1, num_sanity_val_steps=1)
    assert is_n_of_m(module.net[0].weight)


class Rated(PlainModule):
    lr = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class FirstWeights(L.Callback):
    """The dense master with which training begins."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not hasattr(self, "weights"):
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


@pytest.mark.parametrize("finder_first", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_after_a_learning_rate_finder_training_begins_with_the_first_master(tmp_path, method, finder_first):
    finder, first = LearningRateFinder(num_training_steps=4, min_lr=1e-3, max_lr=1e-1), FirstWeights()
    module = Rated()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callbacks = [finder, method()] if finder_first else [method(), finder]
    fit(*callbacks, first, make=lambda: module, exact=False, default_root_dir=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in first.weights.items())
    assert is_n_of_m(module.body[5].weight)
