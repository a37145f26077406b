"""Checkpoints of a sparse run are checkpoints of the plain dense model."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import (
    PlainModule,
    Run,
    SaveEverywhere,
    TinyModule,
    assert_same,
    fit,
    loaders,
    make_trainer,
    samples,
)
from conformance.methods import METHODS, Method, every_method
from torch import Tensor

from sparsetrain import masks_of
from sparsetrain.masks import masks_in


def outputs(module: L.LightningModule) -> Tensor:
    """What the module computes on all samples, as it does when it is evaluated."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        result = module(samples()[0].float() / 64 - 2)
    module.train(was_training)
    return result


class Snapshots(SaveEverywhere):
    """Keeps what the module computed when each checkpoint was saved, and copies of the module."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.outputs: list[Tensor] = []
        self.copies: list[L.LightningModule] = []

    def _save(self, trainer: L.Trainer, moment: str) -> None:
        super()._save(trainer, moment)
        self.outputs.append(outputs(trainer.lightning_module))
        if len(self.saved) % 5 == 0:
            self.copies.append(copy.deepcopy(trainer.lightning_module))
            self.copies.append(pickle.loads(pickle.dumps(trainer.lightning_module.body)))


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def saved_run(request, tmp_path_factory) -> tuple[Method, Run, Snapshots]:
    """A fit of each method, and what was saved in it."""
    saver = Snapshots(tmp_path_factory.mktemp(request.param.name))
    return request.param, fit(request.param.make(), saver), saver


def test_every_checkpoint_loads_strictly_into_the_dense_model_and_computes_the_same(saved_run):
    method, _, saver = saved_run
    assert len(saver.saved) == len(saver.outputs) == 21
    for saved, expected in zip(saver.saved, saver.outputs, strict=True):
        checkpoint = torch.load(saved.path, weights_only=True)
        module = TinyModule()
        module.load_state_dict(checkpoint["state_dict"], strict=True)
        assert torch.equal(outputs(module), expected) or saved.batches < method.gated_until, saved
    loaded = TinyModule.load_from_checkpoint(saver.saved[-1].path, weights_only=True)
    assert torch.equal(outputs(loaded), saver.outputs[-1])


def test_every_checkpoint_holds_tensors_and_primitives_and_masks_at_one_bit_a_weight(saved_run):
    _, run, saver = saved_run
    for saved in saver.saved:
        state = torch.load(saved.path, weights_only=True)["callbacks"][run.callback.state_key]
        sizes = {"body.0.weight": -(-36 // 8), "body.5.weight": 1024 // 8, "head.weight": 48 // 8}
        for name, bits in state["masks"].items():  # of those of which something is pruned
            assert (bits.dtype, bits.numel()) == (torch.uint8, sizes[name])
    assert_same(masks_in(state), dict(run.callback.masks))  # the last one holds the final masks
    assert set(state["masks"]) == set(run.callback.masks)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # which it is not, on purpose
def test_a_checkpoint_is_tested_with_and_without_the_callback(saved_run, tmp_path):
    method, run, _ = saved_run
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    data = loaders()["val_dataloaders"]
    expected = make_trainer().test(run.module, data, verbose=False)
    for callbacks in ([method.make()], []):
        tester = make_trainer(*callbacks)
        assert tester.test(TinyModule(), data, ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected


@every_method
def test_a_module_can_be_copied_and_pickled_during_and_after_the_fit(tmp_path, method):
    saver = Snapshots(tmp_path)
    run = fit(method.make(), saver, make=PlainModule)
    assert len(saver.copies) == 8
    expected = outputs(run.module)
    assert torch.equal(outputs(copy.deepcopy(run.module)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(run.module.cpu()))), expected)


@every_method
def test_only_weights_can_be_saved(tmp_path, method):
    class Save(L.Callback):
        def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    run = fit(method.make(), Save())
    checkpoint = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "callbacks" not in checkpoint
    for name, mask in run.callback.masks.items():
        assert not checkpoint["state_dict"][name][~mask].any()


def test_a_trained_module_has_nothing_of_torch_prune():
    with pytest.raises(ValueError, match=r"No parameter of TinyModule is pruned with torch.nn.utils.prune"):
        masks_of(fit().module)
