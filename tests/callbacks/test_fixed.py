from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance.harness import PlainModule, TinyModule, fit, loaders
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.nn.utils import prune as torch_prune
from torch.utils.data import IterableDataset

from sparsetrain import FixedMasks, GradualMagnitudePruning, OneShot, masks_of, prune, save_masks


@pytest.fixture
def masks() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(prune(TinyModule(), 0.7))


def have(callback: object, masks: dict[str, Tensor]) -> bool:
    return callback.masks.keys() == masks.keys() and all(torch.equal(callback.masks[n], m) for n, m in masks.items())


def test_masks_given_as_tensors_hold_from_the_first_step_to_the_last(masks):
    run = fit(FixedMasks(masks))
    assert have(run.callback, masks)
    assert run.callback.history == []
    assert all(not run.module.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_masks_are_read_from_a_file_of_masks(tmp_path, masks):
    save_masks(masks, tmp_path / "masks.safetensors")
    assert have(fit(FixedMasks(tmp_path / "masks.safetensors")).callback, masks)
    assert have(fit(FixedMasks(str(tmp_path / "masks.safetensors"))).callback, masks)


def test_masks_are_read_from_a_checkpoint_of_a_sparse_run(tmp_path):
    run = fit(GradualMagnitudePruning(OneShot(0.9)))
    run.trainer.save_checkpoint(tmp_path / "sparse.ckpt")
    assert have(fit(FixedMasks(tmp_path / "sparse.ckpt")).callback, dict(run.callback.masks))


def test_masks_are_taken_from_a_module_pruned_by_torch():
    module = PlainModule()
    parts = [(module.body[5], "weight"), (module.head, "weight")]
    torch_prune.global_unstructured(parts, torch_prune.L1Unstructured, amount=0.6)
    masks = masks_of(module)
    for part, name in parts:
        torch_prune.remove(part, name)
    assert masks.keys() == {"body.5.weight", "head.weight"}
    assert all(torch.equal(module.get_parameter(name) != 0, mask) for name, mask in masks.items())
    run = fit(FixedMasks(masks), make=lambda: module)
    assert have(run.callback, masks)
    assert [row.name for row in run.callback.plan if row.pruned] == list(masks)


def test_masks_of_a_module_that_torch_did_not_prune_are_refused():
    with pytest.raises(ValueError, match=r"No parameter of TinyModule is pruned with torch\.nn\.utils\.prune"):
        masks_of(TinyModule())


def test_a_mask_that_is_not_bool_is_refused(masks):
    with pytest.raises(ValueError, match=r"mask of 'head.weight' is torch\.float32; it must be torch\.bool"):
        FixedMasks({"head.weight": masks["head.weight"].float()})


def test_a_file_that_is_missing_or_holds_no_masks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"masks\.safetensors does not exist\. Give a masks\.safetensors"):
        FixedMasks(tmp_path / "masks.safetensors")
    fit().trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match="holds the masks of 0 sparsity callbacks; it must be exactly one"):
        FixedMasks(tmp_path / "dense.ckpt")
    whole = (tmp_path / "dense.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.zeros(1), tmp_path / "tensor.ckpt")
    for name, reason in (("half", r"cannot be read: .*"), ("tensor", r"is no checkpoint")):
        with pytest.raises(ValueError, match=rf"{name}\.ckpt {reason}\. Give a masks\.safetensors file or"):
            FixedMasks(tmp_path / f"{name}.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt is no checkpoint\. Give a masks\.safetensors file or"):
        FixedMasks(tmp_path / "text.ckpt")


class Configured(PlainModule):
    """With hyperparameters that are no plain types."""

    def __init__(self, settings: Namespace) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_checkpoint_that_does_not_load_safely_is_refused_by_its_classes_and_read_once_they_are_allowed(tmp_path):
    run = fit(GradualMagnitudePruning(OneShot(0.9)), make=lambda: Configured(Namespace(width=4)))
    run.trainer.save_checkpoint(tmp_path / "sparse.ckpt")
    with pytest.raises(ValueError, match=r"sparse\.ckpt does not load safely: .* holds argparse\.Namespace, .*Give a"):
        FixedMasks(tmp_path / "sparse.ckpt")
    with torch.serialization.safe_globals([Namespace]):
        assert have(fit(FixedMasks(tmp_path / "sparse.ckpt")).callback, dict(run.callback.masks))


def test_the_final_sparsity_holds_from_the_start(masks):
    callback = fit(FixedMasks(masks)).callback
    assert callback.final_step() == 0
    assert callback.at_target


class Stream(IterableDataset):
    """The batches of the training loader, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loaders()["train_dataloaders"])


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, ()),
        ({"data": loaders() | {"train_dataloaders": Stream()}}, ()),
        ({"max_epochs": -1}, ()),
        ({}, (GradientAccumulationScheduler({0: 1, 1: 2}),)),
    ],
    ids=["known", "stream", "endless", "accumulation"],
)
def test_monitored_checkpoints_are_kept_from_the_start_also_in_a_run_of_unknown_length(
    tmp_path, masks, caplog, settings, others
):
    class Started(Callback):
        def on_train_start(self, *_: Any) -> None:
            at_start.append((best.save_top_k, callback.at_target))

        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    at_start, callback = [], FixedMasks(masks)
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    with caplog.at_level("INFO"):
        fit(callback, best, Started(), *others, make=PlainModule, **settings)
    assert at_start == [(1, True)]
    assert "Monitored checkpoints" not in caplog.text
    assert best.best_model_path


def test_a_norm_may_have_a_mask_too_as_that_of_a_closed_block_has(masks):
    masks |= {name: torch.tensor([True, False, False, True]) for name in ("body.1.weight", "body.1.bias")}
    run = fit(FixedMasks(masks, check="full"))
    assert have(run.callback, masks)
    for name, mask in masks.items():
        weight = run.module.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()
