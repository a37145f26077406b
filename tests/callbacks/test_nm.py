"""What a run of N:M training saves, resumes and leaves, however the Trainer runs it."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.nm_network import (
    BDWP,
    SCALED,
    STE,
    Master,
    MasterAtStart,
    Regression,
    SaveOnce,
    batches,
    conv_net,
    is_n_of_m,
    kinds,
    seeded,
    sorted_mask,
    train,
    validation_loss,
)
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
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsetrain import ops

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
    """Asserts after each forward that the weights made are those of the present master."""

    def __init__(self) -> None:
        self.looked = 0

    def look(self, pl_module: L.LightningModule) -> None:
        for _, layer in ops.effective_layers(pl_module):
            weight = layer.weight.detach()
            assert layer._fresh or not pl_module.automatic_optimization  # in which there are steps between forwards
            for made, axis in zip(layer._cached if layer._fresh else layer.effective(), (1, 0), strict=True):
                assert torch.equal(made, (weight * sorted_mask(weight, 2, 4, axis)).to(made.dtype))
                self.looked += 1

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
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
        def make_weights(self) -> None:
            pass

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
