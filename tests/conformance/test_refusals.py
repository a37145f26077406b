"""What cannot go well is refused with one error that names the value, the limit and the remedy."""

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import (
    STEPS,
    PlainModule,
    SaveEverywhere,
    TinyModule,
    assert_same,
    fit,
    loaders,
    make_trainer,
    seed_all,
)
from conformance.methods import MANY_ROUNDS, every_method
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from sparsetrain import Cubic, FixedMasks, GradualMagnitudePruning, OneShot, Pruning, Selection


def pruning(*include: str, at: int | str = 4, check: str = "cheap") -> GradualMagnitudePruning:
    return GradualMagnitudePruning(OneShot(0.5, at=at), pruning=Pruning(Selection(include)), check=check)


class Wide(PlainModule):
    """The same names with another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body[5], self.head = nn.Linear(64, 20), nn.Linear(20, 3)


class Renamed(PlainModule):
    """The same shapes with another name."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = self.head
        del self.head

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.body(images)))


@every_method
def test_a_dense_checkpoint_is_no_checkpoint_to_resume_from(tmp_path, method):
    saver = SaveEverywhere(tmp_path)
    fit(saver)
    with pytest.raises(
        ValueError, match=rf"holds no state of {type(method.make()).__name__}.*ExactResume.*module.load_state_dict"
    ):
        fit(method.make(), ckpt_path=saver.saved[0].path)


@pytest.mark.parametrize("method", MANY_ROUNDS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "callback",
    [
        lambda: EMAWeightAveraging(decay=0.7),
        lambda: StochasticWeightAveraging(swa_lrs=0.05),
        lambda: EarlyStopping("val/loss"),
    ],
    ids=["ema", "swa", "early_stopping"],
)
def test_what_ends_a_run_or_mixes_weights_across_rounds_is_refused(method, callback):
    name = type(method.make()).__name__
    with pytest.raises(ValueError, match=rf"does not go with {name}: .* Remove it"):
        fit(callback(), method.make())


@pytest.mark.parametrize("method", MANY_ROUNDS, ids=lambda method: method.name)
def test_a_trainer_of_another_length_is_told_the_right_one(method):
    with pytest.raises(ValueError, match=r"are 3 epochs; this Trainer has max_epochs=4 .*Use Trainer\(max_epochs=3\)"):
        fit(method.make(), max_epochs=4)


@pytest.mark.parametrize("method", MANY_ROUNDS, ids=lambda method: method.name)
def test_a_trainer_without_a_length_takes_that_of_the_rounds_and_gets_its_own_back(method):
    run = fit(method.make(), max_epochs=-1)
    assert (run.callback.step, run.trainer.max_epochs) == (STEPS, -1)
    assert_same(run.outcome(), fit(method.make()).outcome())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Lightning's own hint, before the refusal
def test_a_checkpoint_of_another_selection_is_refused(tmp_path):
    saver = SaveEverywhere(tmp_path)
    fit(pruning("body.*"), saver)
    with pytest.raises(ValueError, match=r"holds no state of .*head.*it has .*body.*Resume a run with the callback"):
        fit(pruning("head.*"), ckpt_path=saver.saved[-3].path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Wide,
            r"The given masks belong to another model: 'body.5.weight' has shape \(16, 64\) there and \(20, 64\) here",
        ),
        (Renamed, "'head.weight' matches no parameter. Near names: 'body"),
    ],
)
def test_masks_of_another_model_are_refused(make, message):
    masks = {name: mask.clone() for name, mask in fit(pruning("*")).callback.masks.items()}
    with pytest.raises(ValueError, match=message):
        fit(FixedMasks(masks), make=make)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wide, "'body.5.weight' has shape"),
        (Renamed, r"The saved masks belong to another model or selection: none for \['classifier.weight'\]"),
    ],
)
def test_a_checkpoint_with_masks_of_another_model_is_refused(tmp_path, make, message):
    saver = SaveEverywhere(tmp_path)
    fit(pruning("*"), saver, make=PlainModule)
    path = saver.saved[7].path
    state = torch.load(path, weights_only=True)
    state["state_dict"], state["optimizer_states"] = make().state_dict(), []
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        fit(pruning("*"), make=make, ckpt_path=path)


def test_an_end_beyond_the_run_is_refused_with_the_largest_legal_one():
    beyond = GradualMagnitudePruning(Cubic(0.8, begin=2, end=15, every=2))
    with pytest.raises(ValueError, match=r"last update at step 15, but the run has 15 .*largest legal end is '14it'"):
        fit(beyond)
    fit(GradualMagnitudePruning(Cubic(0.8, begin=2, end=14, every=2)))


def test_a_glob_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(ValueError, match=r"'heads.weight' matches no parameter. Near names: 'head.weight'"):
        fit(pruning("heads.weight"))


def test_nothing_to_prune_is_refused():
    with pytest.raises(ValueError, match=r"TinyModule has nothing to prune with .*bias.*in `include`"):
        fit(pruning("*.bias"))


def test_two_callbacks_on_one_parameter_are_refused():
    with pytest.raises(ValueError, match=r"'body.0.weight' is pruned by two callbacks.*without a common parameter"):
        fit(pruning("*"), pruning("body.*"))


def test_two_equal_callbacks_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradualMagnitudePruning`"):
        fit(pruning("*"), pruning("*"))


def test_optimizers_without_a_pruned_weight_are_refused():
    class Module(PlainModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.head.bias], lr=0.1)

    with pytest.raises(ValueError, match=r"No optimizer holds any of the pruned weights.*configure_optimizers"):
        fit(pruning("*"), make=Module)


@pytest.mark.parametrize("check", ["all", "", True])
def test_an_unknown_check_is_refused(check):
    with pytest.raises(ValueError, match=r"check=.* is unknown. Choose one of 'off', 'cheap', 'full'"):
        pruning("*", check=check)


class NotANumber(PlainModule):
    """The loss of batch 5, the one of the update, is NaN."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 5:
            self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
            return loss * math.nan
        return loss


def test_a_gradient_that_is_not_a_number_at_an_update_is_refused_and_changes_nothing():
    seed_all(3)
    callback, module = pruning("*", at=5), NotANumber()
    message = r"gradient of 'body.0.weight' is not finite at step 5.*Lower the learning rate"
    with pytest.raises(RuntimeError, match=message):
        make_trainer(callback).fit(module, **loaders())
    assert all(bool(mask.all()) for mask in callback.masks.values())
    assert all(torch.equal(p, module.before[name]) for name, p in module.named_parameters())
    assert callback.history == []


class Rogue(L.Callback):
    """Sets pruned weights of one tensor anew in each step's closure, after the gradients were masked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weight = pl_module.get_parameter(self.name)

        @torch.no_grad()
        def write(*_: Any) -> None:
            if trainer.global_step >= 6:
                weight.add_(0.1)

        trainer.optimizers[0].register_step_pre_hook(write)


@pytest.mark.parametrize("name", ["body.0.weight", "body.5.weight", "head.weight"])
def test_a_full_check_catches_a_revived_weight_at_once(name):
    with pytest.raises(RuntimeError, match=rf"A pruned weight of '{name}' was not zero after step 6\."):
        fit(Rogue(name), pruning("*", check="full"))


@pytest.mark.parametrize("name", ["body.0.weight", "body.5.weight", "head.weight"])
def test_a_cheap_check_catches_it_within_as_many_steps_as_there_are_tensors(name):
    with pytest.raises(RuntimeError, match=rf"A pruned weight of '{name}' was not zero after step [678]\."):
        fit(Rogue(name), pruning("*"))


def test_without_a_check_nothing_is_said_and_the_end_is_sparse_nevertheless():
    callback = fit(Rogue("head.weight"), pruning("*", check="off")).callback
    assert not any(bool(callback.masks.revived(name)) for name in callback.masks)


@every_method
@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_weights_are_refused(method, kind):
    # These cannot start here (and DeepSpeed need not be installed): a stand-in trainer holds an object of that class.
    trainer = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[])
    with pytest.raises(ValueError, match=rf"cannot mask weights that {kind.__name__} shards. Use strategy='ddp'"):
        method.make().setup(trainer, TinyModule(), "fit")


@every_method
def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path, method):
    saver = SaveEverywhere(tmp_path)
    fit(method.make(), saver)
    path = saver.saved[3].path
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["ExactResume"]["random"] *= 2
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"a run on 2 processes and cannot be resumed exactly on 1\. Use as many"):
        fit(method.make(), ckpt_path=path)
