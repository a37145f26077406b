"""What a step of N:M training computes: products, the decay, when effective weights are made."""

import itertools
from copy import deepcopy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.nm_network import (
    BDWP,
    LR,
    STE,
    WEIGHT_DECAY,
    Batch,
    Master,
    Matrices,
    Regression,
    batches,
    both_directions,
    conv_net,
    forward_only,
    mlp,
    seeded,
    sorted_mask,
    train,
    transposable,
)
from conformance.harness import assert_same
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from sparsetrain import BidirectionalWeightPruning, ops
from sparsetrain.ops.layers import _Effective

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
        pass

    def make_weights(self) -> None:
        if not self.step:
            super().make_weights()


def test_effective_weights_that_outlive_a_step_train_another_network(monkeypatch):
    net = seeded(mlp)
    data = batches(net, 3)
    expected = list(Matrices(net, both_directions(2, 4), dense=[4]).train(data))
    stale, fresh = Master(), Master()
    with monkeypatch.context() as patched:  # layers look at versions, too, where they are not compiled
        patched.setattr(_Effective, "_is_present", property(lambda layer: layer._fresh))
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

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.make_weights()
        self.apply = self.make_weights = lambda: None


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
    assert [after - before for before, after in itertools.pairwise(count.by_batch)] == [layers, 0, 0] * 2 + [layers, 0]
    assert count.made == 0


def test_under_bfloat16_autocast_a_step_equals_the_one_without_kept_weights():
    class Uncached(BidirectionalWeightPruning):
        def make_weights(self) -> None:
            pass

    class Dtypes(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.found = {t.dtype for _, layer in ops.effective_layers(pl_module) for t in layer._cached or ()}

    net = seeded(conv_net)
    data = [(x.float(), y.float()) for x, y in batches(net, 3)]
    dtypes, kept, uncached = Dtypes(), Master(), Master()
    train(Regression(deepcopy(net)), data, BDWP(decay=0.1), kept, dtypes, precision="bf16-mixed")
    assert dtypes.found == {torch.bfloat16}
    train(Regression(deepcopy(net)), data, Uncached(decay=0.1), uncached, dtypes, precision="bf16-mixed")
    assert dtypes.found == set()
    assert_same(kept.masters, uncached.masters)


class SharpnessAware(Regression):
    """Two gradients a step: the second one where the weights have been moved along the first one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.found: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            x = batch[0].double()
            layer = self.net[0]
            expected = nn.functional.linear(x, layer.rule.weights(layer.weight.detach(), x.dtype)[0], layer.bias)
            self.found.append((layer(x).detach(), expected.detach()))
            with torch.no_grad():
                layer.weight.add_(torch.randn_like(layer.weight))


def test_weights_that_the_module_moves_within_a_batch_are_those_that_are_multiplied():
    net = seeded(mlp)
    module = SharpnessAware(net)
    train(module, batches(net, 3), BDWP(), precision="64-true")
    assert len(module.found) == 6
    for found, expected in module.found:
        assert torch.equal(found, expected)
