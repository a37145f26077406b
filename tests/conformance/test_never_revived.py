"""Pruned weights are exactly zero after each step, at validation, in checkpoints and after the fit, whatever trains."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning as L
import pytest
import timm.optim
import torch
from conformance.harness import STEPS, PlainModule, Run, SaveEverywhere, TinyModule, Watch, fit
from conformance.methods import METHODS, every_method
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from sparsetrain import (
    Cubic,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    Masks,
    Movement,
    OneShot,
    Pruning,
    Selection,
)

MOMENTS = {"step", "batch end", "validation", "end"}


def gradual(**settings: Any) -> GradualMagnitudePruning:
    return GradualMagnitudePruning(Cubic(0.8, begin=2, end=8, every=2), check="full", **settings)


def watched(*callbacks: L.Callback, **settings: Any) -> Run:
    """Fit under a `Watch` that has seen sparse weights at every moment."""
    watch = Watch(regrow=any(getattr(callback, "regrow", False) for callback in callbacks))
    run = fit(*callbacks, watch, **settings)
    assert watch.seen.keys() >= MOMENTS
    return run


def is_exact(run: Run, sparsity: float) -> bool:
    """The masks keep exactly n - floor(s * n + 0.5) weights, and the weights show it."""
    masks = run.callback.masks
    total = sum(mask.numel() for mask in masks.values())
    pruned_are_zero = all(not run.module.get_parameter(name)[~mask].any() for name, mask in masks.items())
    return pruned_are_zero and sum(int(m.sum()) for m in masks.values()) == total - math.floor(sparsity * total + 0.5)


@every_method
def test_weights_stay_zero_at_every_moment(tmp_path, method):
    watch, saver = Watch(regrow=method.regrow), SaveEverywhere(tmp_path)
    run = fit(method.make(check="full"), saver, watch)
    assert watch.seen.keys() >= {*MOMENTS, "checkpoint"}
    assert is_exact(run, method.sparsity)


@every_method
def test_each_update_reaches_exactly_its_target(method):
    callback = fit(method.make()).callback
    total = sum(mask.numel() for mask in callback.masks.values())
    for update in callback.history:
        assert sum(update.kept.values()) == total - math.floor(update.target * total + 0.5)
    assert callback.masks.sparsity() == pytest.approx(method.sparsity, abs=0.5 / total)
    assert callback.step == STEPS


@pytest.mark.slow
@every_method
@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=["accumulate", "clip_norm", "clip_value", "bf16_mixed", "bf16_true"],
)
def test_weights_stay_zero_under_every_trainer_setting(method, settings):
    assert is_exact(watched(method.make(check="full"), **settings), method.sparsity)


def torch_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        f"torch.{name}": kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


def timm_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    def make(name: str) -> Callable[..., torch.optim.Optimizer]:
        return lambda parameters: timm.optim.create_optimizer_v2(parameters, opt=name, lr=0.01, weight_decay=0.01)

    return {f"timm.{name}": make(name) for name in timm.optim.list_optimizers()}


OPTIMIZERS = torch_optimizers() | timm_optimizers()


def parameters_for(name: str, module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if name != "torch.Muon" or p.dim() == 2]


@cache
def why_it_cannot_train(name: str) -> str | None:
    """The reason why this optimizer cannot train the dense model on this machine."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    @torch.enable_grad()
    def closure() -> Tensor:
        module.zero_grad()
        loss = module(torch.ones(2, 1, 4, 4)).square().mean()
        loss.backward()
        return loss

    try:
        with warnings.catch_warnings(action="ignore"):
            optimizer = OPTIMIZERS[name](parameters_for(name, module))
            for _ in range(2):
                optimizer.step(closure)
    except Exception as error:  # each in its own way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@pytest.mark.slow
def test_nearly_all_optimizers_can_be_tried():
    unfit = {name: why for name in OPTIMIZERS if (why := why_it_cannot_train(name)) is not None}
    assert len(OPTIMIZERS) - len(unfit) >= 90, unfit
    # The first needs sparse gradients, the second a graph of the gradients; the others are CUDA kernels.
    assert {name for name, why in unfit.items() if "CUDA" not in why} == {"torch.SparseAdam", "timm.adahessian"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # each optimizer warns of its own deprecations
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weights_stay_zero_under_every_optimizer(name):
    if (why := why_it_cannot_train(name)) is not None:
        pytest.skip(why)

    class Module(PlainModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS[name](parameters_for(name, self))

    callback = GradualMagnitudePruning(Cubic(0.6, begin=1, end=3, every=1), check="full")
    assert is_exact(watched(callback, make=Module, max_epochs=1), 0.6)


# Compiling takes seconds. Those that convert layers are compared with their network uncompiled in test_nm.py.
ONE_OF_EACH_CLASS = {type(method.make()): method for method in METHODS if not method.converts}.values()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it in `log`
@pytest.mark.parametrize("method", ONE_OF_EACH_CLASS, ids=lambda method: method.name)
def test_weights_stay_zero_in_a_compiled_module(method):
    torch.compiler.reset()
    run = watched(method.make(check="full"), make=lambda: torch.compile(PlainModule(), backend="aot_eager"))
    assert is_exact(run, method.sparsity)


@pytest.mark.slow
def test_weights_stay_zero_in_a_network_compiled_in_place():
    class Module(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.body.compile(backend="aot_eager")

    torch.compiler.reset()
    assert is_exact(watched(gradual(), make=Module), 0.8)


class Tied(PlainModule):
    """Its two linear layers have one weight, found under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Sequential(self.first, nn.ReLU(), self.second, nn.ReLU(), nn.Linear(16, 3))


def test_a_tied_weight_is_pruned_once_and_stays_zero_under_both_names(tmp_path):
    run = watched(gradual(), make=Tied)
    assert is_exact(run, 0.8)
    assert run.module.first.weight is run.module.second.weight
    shared = [name for name in run.callback.masks if run.module.get_parameter(name) is run.module.first.weight]
    assert len(shared) == 1
    run.trainer.save_checkpoint(tmp_path / "tied.ckpt")
    state = torch.load(tmp_path / "tied.ckpt", weights_only=True)["state_dict"]
    for name in ("first.weight", "second.weight", "head.0.weight", "head.2.weight"):
        assert not state[name][~run.callback.masks[shared[0]]].any(), name


def test_frozen_parameters_are_pruned_and_otherwise_keep_their_values():
    class Module(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.body[0].requires_grad_(False)
            self.frozen = self.body[0].weight.clone()

    run = watched(gradual(), make=Module)
    assert is_exact(run, 0.8)
    mask = run.callback.masks["body.0.weight"]
    assert torch.equal(run.module.body[0].weight, run.module.frozen * mask)


class Alternating(PlainModule):
    """Manual optimization: one optimizer for the body, one for the head, which steps every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        body = torch.optim.SGD(self.body.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        return [body, torch.optim.Adam(self.head.parameters(), lr=0.01)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        body, head = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        body.step()
        if batch_idx % 2:
            head.step()
        self.zero_grad()
        return loss


def test_with_several_optimizers_the_steps_of_the_first_are_counted_and_the_run_says_so(caplog):
    with caplog.at_level("INFO"):
        run = watched(gradual(), make=Alternating)
    assert is_exact(run, 0.8)
    assert run.callback.step == STEPS
    assert "Steps are those of optimizer 0 (SGD)." in caplog.text


class Overflowing(PlainModule):
    """Its loss is infinite on one batch, the one of an update step."""

    bad_batch = 4

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if self.trainer.fit_loop.total_batch_idx + 1 == self.bad_batch else loss


@pytest.mark.parametrize("pruning", [Pruning(), Pruning(criterion=Movement())], ids=["magnitude", "movement"])
def test_a_step_that_a_gradient_scaler_skips_is_not_counted_and_its_update_is_made_at_the_repetition(pruning):
    def train(make: Callable[[], L.LightningModule]) -> Run:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        return watched(gradual(pruning=pruning), make=make, plugins=[precision])

    skipped, clean = train(Overflowing), train(PlainModule)
    assert skipped.callback.step == STEPS - 1
    assert clean.callback.step == STEPS
    assert [update.step for update in skipped.callback.history] == [2, 4, 6, 8]
    assert [update.step for update in clean.callback.history] == [2, 4, 6, 8]
    assert is_exact(skipped, 0.8)
    assert all(p.isfinite().all() for p in skipped.module.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA says that it does what it is for
@pytest.mark.parametrize("method", [m for m in METHODS if not m.many_rounds], ids=lambda method: method.name)
@pytest.mark.parametrize("first", [True, False], ids=["averaging_first", "averaging_last"])
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(decay=0.7),
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
    ],
    ids=["ema", "swa"],
)
def test_averaged_weights_are_zero_where_pruned(tmp_path, averaging, method, first):
    if method.converts and first:
        with pytest.raises(ValueError, match=r"has copied the module before \w+ could convert .* List it after \w+\."):
            fit(averaging(), method.make(), make=PlainModule)
        return
    callbacks = [averaging(), method.make(check="full")]
    run = watched(*(callbacks if first else callbacks[::-1]), SaveEverywhere(tmp_path), make=PlainModule)
    assert is_exact(run, method.sparsity)


def test_masking_gradients_alone_revives_weights_under_momentum():
    class Naive(L.Callback):
        """One-shot pruning at step 5 that then masks only gradients."""

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 5:
                self.masks = Masks()
                self.masks.bind(pl_module)
                self.masks.update(0.8)
                self.masks.apply_()
            if trainer.global_step >= 5:
                self.masks.zero_grads_()

    naive = Naive()
    fit(naive, make=PlainModule)
    assert any(bool(naive.masks.revived(name)) for name in naive.masks)
    assert is_exact(watched(GradualMagnitudePruning(OneShot(0.8, at=5)), make=PlainModule), 0.8)


def test_two_callbacks_with_selections_apart_both_stay_exact():
    body = gradual(pruning=Pruning(Selection(include=("body.*",))))
    head = GradualMagnitudePruning(OneShot(0.5, at=4), pruning=Pruning(Selection(include=("head.*",))), check="full")
    watched(body, head)
    assert set(head.masks) == {"head.weight"}
    assert head.masks.sparsity() == 0.5
    assert body.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("optimizer_state", ["keep", "reset", "snapshot"])
def test_rounds_that_rewind_leave_the_zeros_of_another_callback(optimizer_state):
    body = IterativeMagnitudePruning(
        1,
        "2ep",
        sparsity=0.8,
        weights="rewind",
        rewind_to="1ep",
        optimizer_state=optimizer_state,
        pruning=Pruning(Selection(include=("body.*",))),
        check="full",
    )
    head = GradualMagnitudePruning(OneShot(0.5, at=7), pruning=Pruning(Selection(include=("head.*",))), check="full")
    run = watched(body, head)
    assert run.trainer.global_step == STEPS
    assert head.masks.sparsity() == 0.5


def test_weights_stay_zero_in_epochs_of_one_batch():
    run = watched(METHODS[0].make(check="full"), limit_train_batches=1, max_epochs=10)
    assert is_exact(run, 0.8)


def test_the_module_of_the_task_prunes_its_three_weights():
    assert list(fit(gradual(), make=TinyModule).callback.masks) == ["body.0.weight", "body.5.weight", "head.weight"]
