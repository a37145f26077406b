"""Errors that only a started run can find; what every method refuses stands in conformance/test_refusals.py."""

import pytest
import torch
from conformance.harness import PlainModule, fit, loaders, make_trainer

from sparsetrain import GradualMagnitudePruning, OneShot


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
