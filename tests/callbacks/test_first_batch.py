from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.recording import Quiet
from conformance.harness import assert_same, fit, loaders, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsetrain import PolarizationGating, SparseModelSoup
from sparsetrain.callbacks import LinearWeight
from sparsetrain.callbacks.first_batch import FirstBatch

plain_loader = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


def soup() -> SparseModelSoup:
    return SparseModelSoup(1, "1ep", sparsity=0.5, ingredients=2)


def gating() -> PolarizationGating:
    return PolarizationGating(
        sparsity=0.3,
        polarization=LinearWeight(0.1, 0, 4),
        budget=10.0,
        begin=0,
        end=2,
        extract_at=8,
        gate_lr=0.5,
        input_shape=(1, 4, 4),
        hidden=4,
    )


def raw() -> dict[str, Any]:
    """Images from 0 to 255, and labels."""
    return loaders() | {"train_dataloaders": DataLoader([(x.float(), y) for x, y in zip(*samples(), strict=True)], 8)}


class InStep(Quiet):
    """Normalizes in its training step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step(((images - 128) / 64, labels), batch_idx)


class InForward(Quiet):
    """Normalizes in its `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 128) / 64)


class AroundForward(InForward):
    """Normalizes in its `forward`, and in a training step that does not call it."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = Quiet.forward(self, (images - 128) / 64)
        return nn.functional.cross_entropy(logits, labels)


class Mixed(InForward):
    """Mixes the images of a batch in its training step, and adds noise."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        mixed = 0.6 * images + 0.4 * images.flip(0) + 10 * torch.randn_like(images)
        return super().training_step((mixed, labels), batch_idx)


@plain_loader
@pytest.mark.parametrize("callback", [soup, gating])
def test_a_module_that_normalizes_in_its_training_step_is_told_so(callback):
    with pytest.warns(UserWarning, match=r"of InStep gets inputs of mean .* in `training_step`, but 1\d\d and .* Norm"):
        fit(callback(), make=InStep, data=raw(), exact=False)


@plain_loader
@pytest.mark.parametrize("module", [InForward, AroundForward, Mixed])
@pytest.mark.parametrize("callback", [soup, gating])
@pytest.mark.filterwarnings("ignore:.* of the gates are undecided")
def test_others_are_not(callback, module):
    run = fit(callback(), make=module, data=raw(), exact=False)
    assert not any(part._forward_pre_hooks for part in run.module.modules())


class Indexed(Quiet):
    """Takes batches of (indices, images, labels)."""

    losses = 0

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        self.losses += 1
        return super().training_step((batch[1], batch[2]), batch_idx)


@plain_loader
@pytest.mark.parametrize("callback", [soup, gating])
def test_a_batch_that_forward_cannot_take_is_refused_before_a_step(callback):
    data = [(i, x / 64 - 2, y) for i, (x, y) in enumerate(zip(*samples(), strict=True))]
    module = Indexed()
    with pytest.raises(ValueError, match=r"a tensor of torch\.int64 and shape \(8,\); its `forward` fails: .*Let the"):
        fit(callback(), make=lambda: module, data=loaders() | {"train_dataloaders": DataLoader(data, 8)}, exact=False)
    assert module.losses == 0
    assert not any(part._forward_pre_hooks for part in module.modules())


class Restless(Quiet):
    """Draws, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x + 0.01 * torch.randn_like(x))


def test_a_trial_leaves_no_trace():
    class Look(L.Callback):
        """Looks itself, within a fit."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before = [deepcopy(dict(pl_module.state_dict())), torch.get_rng_state()]
            modes = [part.training for part in pl_module.modules()]
            first = FirstBatch(trainer, pl_module)
            first.look(batch)
            assert_same(before, [dict(pl_module.state_dict()), torch.get_rng_state()])
            assert modes == [part.training for part in pl_module.modules()]
            assert sum(len(part._forward_pre_hooks) for part in pl_module.modules()) == 1
            first.look(batch)  # the next one
            assert not any(part._forward_pre_hooks for part in pl_module.modules())
            trainer.should_stop = True

    fit(Look(), make=Restless, exact=False)
