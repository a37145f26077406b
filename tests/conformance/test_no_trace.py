"""After a fit and after an exception, nothing is left on the module, its optimizers and the Trainer."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import STEPS, TinyModule, assert_same, fit, loaders, make_trainer, seed_all
from conformance.methods import METHODS, every_method
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn


def hooks(module: nn.Module, trainer: L.Trainer) -> list[Any]:
    """Every hook of the module's parts and parameters and of the optimizers."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    found = [getattr(part, kind) for part in module.modules() for kind in kinds]
    found += [p._backward_hooks for p in module.parameters()]
    found += [p._post_accumulate_grad_hooks for p in module.parameters()]
    for optimizer in trainer.optimizers:
        found += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return [hook for held in found if held for hook in held.values()]


class Broken(TinyModule):
    """Raises at a batch after the first pruning."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.fit_loop.total_batch_idx == 12:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def interrupted(*callbacks: L.Callback, **settings: Any) -> tuple[Broken, L.Trainer]:
    seed_all(3)
    module, trainer = Broken(), make_trainer(*callbacks, **settings)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(module, **loaders())
    return module, trainer


def used_and_fresh(module: L.LightningModule) -> tuple[Callable[[], TinyModule], Callable[[], TinyModule]]:
    """`module` itself, and a new module with its weights; both draw as much from the generators."""
    state = {name: value.clone() for name, value in module.state_dict().items()}

    def used() -> TinyModule:
        TinyModule()
        return module

    def fresh() -> TinyModule:
        new = TinyModule()
        new.load_state_dict(state)
        return new

    return used, fresh


@every_method
def test_no_hook_is_left_after_the_fit(method):
    dense, run = fit(), fit(method.make())
    assert hooks(run.module, run.trainer) == hooks(dense.module, dense.trainer) == []
    assert vars(run.module).keys() == vars(dense.module).keys()
    assert [name for name, _ in run.module.named_parameters()] == [name for name, _ in dense.module.named_parameters()]


@every_method
def test_no_hook_is_left_after_an_exception(method):
    module, trainer = interrupted(method.make())
    assert hooks(module, trainer) == []


@every_method
@pytest.mark.parametrize("ends", ["fit", "exception"])
def test_a_monitored_checkpoint_gets_its_settings_back(tmp_path, method, ends):
    keeper = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=2, save_last=True)
    fit(method.make(), keeper) if ends == "fit" else interrupted(method.make(), keeper)
    assert (keeper.save_top_k, keeper.save_last) == (2, True)


@every_method
def test_a_second_fit_with_the_same_module_and_callback_equals_one_with_new_ones(method):
    callback = method.make()
    first = fit(callback)
    used, fresh = used_and_fresh(first.module)
    again, clean = fit(callback, make=used), fit(method.make(), make=fresh)
    assert_same(again.outcome(), clean.outcome())
    assert again.callback.step == STEPS


@every_method
def test_a_fit_without_the_callback_afterwards_is_plain_dense_training(method):
    sparse = fit(method.make())
    used, fresh = used_and_fresh(sparse.module)
    after, plain = fit(make=used), fit(make=fresh)
    assert_same(after.outcome(), plain.outcome())
    for name, mask in sparse.callback.masks.items():
        assert after.module.get_parameter(name)[~mask].any()  # nothing holds them at zero any longer


# With an OnExceptionCheckpoint Lightning looks for a checkpoint to resume from, and warns that it finds none.
@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")
@every_method
def test_a_run_that_an_exception_ends_still_saves_a_sparse_checkpoint_that_resumes(tmp_path, method):
    callback = method.make()
    interrupted(callback, OnExceptionCheckpoint(tmp_path))
    path = tmp_path / "on_exception.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert callback.masks.sparsity() > 0
    for name, mask in callback.masks.items():
        assert not checkpoint["state_dict"][name][~mask].any()
    resumed = fit(method.make(), ckpt_path=path)
    assert resumed.callback.step == STEPS - 1  # the batch that failed is not repeated
    assert resumed.callback.masks.sparsity() == pytest.approx(method.sparsity, abs=1e-3)


def test_the_callback_can_be_made_once_and_used_by_two_trainers():
    callback = METHODS[0].make()
    assert_same(fit(callback).outcome(), fit(callback).outcome())
