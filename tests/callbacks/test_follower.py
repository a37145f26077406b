"""Optimizers that skip steps by themselves, or change while the network trains."""

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import STEPS, PlainModule, Run, Watch, assert_same, fit
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from sparsetrain import Constant, GradualMagnitudePruning, Magnitude, Movement, OneShot, Pruning
from sparsetrain.criteria import Criterion


class Backbone(PlainModule):
    """A head on a network that is frozen at first."""

    @property
    def backbone(self) -> torch.nn.Module:
        return self.body

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # batch norm's, never frozen
def test_parameters_that_come_into_an_optimizer_during_training_stay_pruned():
    thawing = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.1, verbose=False)
    watch = Watch()
    with pytest.warns(UserWarning, match=r"^'body.0.weight' \(2 of 3 parameters with a mask\) is in no optimizer now"):
        run = fit(thawing, GradualMagnitudePruning(OneShot(0.8), check="full"), watch, make=Backbone)
    assert len(run.trainer.optimizers[0].param_groups) > 1
    assert run.callback.step == STEPS
    assert watch.seen["step"] == 3 * STEPS


class AddsNoise(PlainModule):
    """Writes all gradients after the callbacks have had their turn."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad.add_(torch.randn_like(parameter))


class ClipsWithNoise(PlainModule):
    """The same in another hook."""

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *arguments: Any, **settings: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.add_(torch.randn_like(parameter))


class NoiseByHand(AddsNoise):
    """The same under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("make", [AddsNoise, ClipsWithNoise, NoiseByHand])
def test_gradients_that_the_module_writes_last_revive_nothing(make):
    watch = Watch()
    run = fit(GradualMagnitudePruning(OneShot(0.8), check="full"), watch, make=make)
    assert watch.seen["step"] == 3 * STEPS
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


class ReadsBatches(PlainModule):
    """Takes its batches from the iterator."""

    def training_step(self, dataloader_iter: Any) -> torch.Tensor:
        (images, labels), _, _ = next(dataloader_iter)
        return torch.nn.functional.cross_entropy(self(images), labels)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_reads_its_batches_by_itself_is_followed():
    run = fit(GradualMagnitudePruning(OneShot(0.8), check="full"), make=ReadsBatches)
    assert run.callback.step == STEPS


@pytest.mark.parametrize("moving", [False, True], ids=["preserving_zeros", "moving_zeros"])
def test_an_optimizer_that_takes_the_place_of_the_counted_one_is_counted_and_followed(moving):
    class Nudging(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(1e-3)
            return loss

    class Replacing(PlainModule):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                make = Nudging if moving else partial(torch.optim.Adam, betas=(0.9, 0.99))
                self.trainer.strategy.optimizers = [make(self.parameters(), lr=0.01)]

    run = fit(GradualMagnitudePruning(OneShot(0.8, at=7), check="full"), Watch(), make=Replacing)
    assert run.callback.step == STEPS
    assert [update.step for update in run.callback.history] == [7]
    assert not run.trainer.optimizers[0]._optimizer_step_post_hooks


def test_a_step_that_calls_the_step_of_the_class_above_counts_once():
    class Plain(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # from here on hooks run in its step, too
    run = fit(GradualMagnitudePruning(OneShot(0.8, at=7)), make=partial(PlainModule, partial(Plain, lr=0.1)))
    assert run.callback.step == STEPS
    assert [update.step for update in run.callback.history] == [7]


class Overflowing(PlainModule):
    """Its loss is infinite on one batch.

    Args:
        bad_batch: counted from 1; 0 for none.
        fused: whether its optimizer unscales gradients and skips steps by itself.
    """

    def __init__(self, bad_batch: int, *, fused: bool) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=fused))
        self.bad_batch = bad_batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if self.trainer.fit_loop.total_batch_idx + 1 == self.bad_batch else loss


def scaled(callback: L.Callback, bad_batch: int, *, fused: bool) -> Run:
    """A run whose scale changes all the while."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    return fit(callback, make=partial(Overflowing, bad_batch, fused=fused), plugins=[precision])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_first_step_that_is_skipped_does_not_count_and_its_update_is_made_at_the_next(fused):
    callback = scaled(GradualMagnitudePruning(Constant(0.8)), 1, fused=fused).callback
    assert callback.step == STEPS - 1
    assert [update.step for update in callback.history] == [0]
    assert callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("criterion", [Magnitude(), Movement()], ids=["magnitude", "movement"])
def test_a_fused_optimizer_gives_the_masks_of_one_that_is_not_fused(criterion: Criterion):
    def masks(*, fused: bool) -> dict[str, Tensor]:
        callback = GradualMagnitudePruning(OneShot(0.8, at=12), pruning=Pruning(criterion=criterion))
        return dict(scaled(callback, 4, fused=fused).callback.masks)

    assert_same(masks(fused=True), masks(fused=False))
