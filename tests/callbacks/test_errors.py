"""Errors that only a started run can find; what every method refuses stands in conformance/test_refusals.py."""

import pytest
import torch
from conformance.harness import PlainModule, fit, loaders, make_trainer

from sparsetrain import (
    NM,
    Channel,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    OneShot,
    Pruning,
    Selection,
    SparsityCallback,
)
from sparsetrain.patterns import Pattern


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_epochs_without_a_known_length_ask_for_steps() -> None:
    class Endless:
        def __iter__(self):
            while True:
                yield from loaders()["train_dataloaders"]

    trainer = make_trainer(
        GradualMagnitudePruning(OneShot(0.5, at="1ep")), max_epochs=-1, max_steps=4, limit_val_batches=0
    )
    with pytest.raises(ValueError, match="'1ep' counts epochs, but how many optimizer steps"):
        trainer.fit(PlainModule(), Endless())


def test_scores_that_are_not_finite_stop_the_run() -> None:
    class Diverged(PlainModule):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                with torch.no_grad():
                    self.head.weight[0, 0] = float("inf")

    with pytest.raises(RuntimeError, match=r"scores of 'head.weight' at step 3 are not all finite"):
        fit(GradualMagnitudePruning(OneShot(0.5, at=3)), make=Diverged)


def test_more_than_the_floors_allow_names_the_largest_sparsity() -> None:
    with pytest.raises(ValueError, match=r"at least 3 in 3 tensors. The largest sparsity that leaves them is 0\.997"):
        fit(GradualMagnitudePruning(OneShot(0.9999, at=3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda final, pruning: GradualMagnitudePruning(OneShot(final, at=3), pruning=pruning),
        lambda final, pruning: IterativeMagnitudePruning(2, "1ep", sparsity=final, pruning=pruning),
    ],
)
def test_a_sparsity_that_the_pattern_turns_into_another_is_told_of(make) -> None:
    def train(final: float, pattern: Pattern) -> SparsityCallback:
        callback = make(final, Pruning(Selection(exclude=("body.0.weight",)), pattern=pattern))
        fit(callback, max_epochs=3)
        return callback

    with pytest.warns(UserWarning, match=r"NM\(n=2, m=4, axis=1\) turns the sparsity 0\.8 .* into about 0\.5000"):
        assert train(0.8, NM(2, 4)).masks.sparsity() == 0.5
    train(0.5, NM(2, 4))
    train(0.8, Channel())
