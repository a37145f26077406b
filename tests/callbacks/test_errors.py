"""Bad input is one error, with the value, the limit and the remedy, and nothing is lost."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import PlainModule, TinyModule, fit, loaders, make_trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from sparsetrain import Cubic, GradualMagnitudePruning, OneShot, Pruning, Selection


def prune_at(step: int = 3, sparsity: float = 0.5, **settings: Any) -> GradualMagnitudePruning:
    return GradualMagnitudePruning(OneShot(sparsity, at=step), **settings)


def test_a_dense_checkpoint_is_not_resumed_as_a_sparse_run(tmp_path: Path) -> None:
    fit().trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match=r"holds no state of GradualMagnitudePruning.*without its masks"):
        fit(prune_at(), ckpt_path=tmp_path / "dense.ckpt")


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    class Wider(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    fit(prune_at(), make=PlainModule).trainer.save_checkpoint(tmp_path / "other.ckpt")
    checkpoint = torch.load(tmp_path / "other.ckpt", weights_only=True)
    checkpoint["state_dict"] |= {"extra.weight": torch.ones(2, 2), "extra.bias": torch.ones(2)}
    checkpoint["optimizer_states"][0] = torch.optim.SGD(Wider().parameters(), lr=0.1, momentum=0.9).state_dict()
    checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"] |= {"processed": 2, "completed": 2}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"belong to another model or selection: none for \['extra.weight'\]"):
        fit(prune_at(), make=Wider, ckpt_path=tmp_path / "other.ckpt")


def test_a_schedule_that_ends_after_the_run_names_the_largest_legal_end() -> None:
    with pytest.raises(ValueError, match=r"last update at step 20, but the run has 15 .*largest legal end is '14it'"):
        fit(GradualMagnitudePruning(Cubic(0.8, begin=0, end="4ep")))
    callback = fit(GradualMagnitudePruning(Cubic(0.8, begin=0, end="14it"))).callback
    assert callback.history[-1].step == 14


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_epochs_without_a_known_length_ask_for_steps() -> None:
    class Endless:
        def __iter__(self):
            while True:
                yield from loaders()["train_dataloaders"]

    with pytest.raises(ValueError, match="'1ep' counts epochs, but how many optimizer steps"):
        make_trainer(prune_at("1ep"), max_epochs=-1, max_steps=4, limit_val_batches=0).fit(  # type: ignore[arg-type]
            PlainModule(), Endless()
        )


def test_a_glob_that_matches_nothing_lists_near_names() -> None:
    with pytest.raises(ValueError, match=r"'haed.weight' matches no parameter. Near names: 'head.weight'"):
        fit(prune_at(pruning=Pruning(Selection(include=("haed.weight",)))))


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ValueError, match="has nothing to prune"):
        fit(prune_at(pruning=Pruning(Selection(include=("*.bias",)))))


def test_two_callbacks_on_one_parameter_are_refused() -> None:
    head = Pruning(Selection(include=("head.*",)))
    with pytest.raises(ValueError, match=r"'head.weight' is pruned by two callbacks.*without a common parameter"):
        fit(prune_at(), prune_at(pruning=head))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_weights_are_refused_at_setup(strategy: type) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])
    with pytest.raises(ValueError, match=rf"weights that {strategy.__name__} shards. Use strategy='ddp'"):
        prune_at().setup(trainer, TinyModule(), "fit")


def test_a_gradient_that_is_not_finite_at_an_update_leaves_weights_and_masks_alone() -> None:
    class Broken(PlainModule):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                self.before = self.head.weight.detach().clone()
                self.head.weight.grad[0, 0] = float("nan")

    callback, module = prune_at(3), Broken()
    with pytest.raises(RuntimeError, match=r"gradient of 'head.weight' is not finite at step 3"):
        make_trainer(callback).fit(module, **loaders())
    assert torch.equal(module.head.weight, module.before)
    assert callback.masks.sparsity() == 0.0


def test_scores_that_are_not_finite_stop_the_run() -> None:
    class Diverged(PlainModule):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                with torch.no_grad():
                    self.head.weight[0, 0] = float("inf")

    with pytest.raises(RuntimeError, match=r"scores of 'head.weight' at step 3 are not all finite"):
        fit(prune_at(3), make=Diverged)


class Rogue(L.Callback):
    """Writes to pruned weights just before the optimizer's step."""

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 6:
            pl_module.head.weight.data.fill_(1.0)


def test_the_full_check_names_the_tensor_and_the_step_of_a_revived_weight() -> None:
    with pytest.raises(RuntimeError, match=r"pruned weight of 'head.weight' was not zero after step 6\."):
        fit(prune_at(check="full"), Rogue())


def test_the_cheap_check_finds_it_within_as_many_steps_as_there_are_tensors() -> None:
    with pytest.raises(RuntimeError, match=r"pruned weight of 'head.weight' was not zero after step [678]\."):
        fit(prune_at(check="cheap"), Rogue())


def test_without_a_check_the_weights_are_still_sparse_at_the_end() -> None:
    run = fit(prune_at(check="off"), Rogue())
    assert not (run.module.head.weight[~run.callback.masks["head.weight"]] != 0).any()


def test_no_optimizer_of_a_pruned_weight_is_an_error() -> None:
    class Elsewhere(PlainModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.head.bias], lr=0.1)

    with pytest.raises(ValueError, match="No optimizer holds any of the pruned weights"):
        fit(prune_at(), make=Elsewhere)


def test_more_than_the_floors_allow_names_the_largest_sparsity() -> None:
    with pytest.raises(ValueError, match=r"at least 3 in 3 tensors. The largest sparsity that leaves them is 0\.997"):
        fit(prune_at(sparsity=0.9999))
