from pathlib import Path

import pytest
import torch
from conformance.harness import TinyModule, fit
from torch.nn.utils import prune as torch_prune

from sparsetrain import FixedMasks, GradualMagnitudePruning, OneShot, masks_of, prune, save_masks


def given() -> dict[str, torch.Tensor]:
    return dict(prune(TinyModule(), 0.6))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_masks_do_not_change_and_the_weights_train() -> None:
    masks = given()
    before = {name: weight.clone() for name, weight in TinyModule().named_parameters()}
    run = fit(FixedMasks(masks))
    assert same(dict(run.callback.masks), masks)
    assert run.callback.history == []
    for name, mask in masks.items():
        weight = run.module.get_parameter(name)
        assert not (weight[~mask] != 0).any()
        assert not torch.equal(weight[mask], before[name][mask])


def test_they_come_from_a_masks_file(tmp_path: Path) -> None:
    masks = given()
    save_masks(masks, tmp_path / "masks.safetensors")
    assert same(dict(fit(FixedMasks(tmp_path / "masks.safetensors")).callback.masks), masks)


def test_they_come_from_a_checkpoint_of_a_sparse_run(tmp_path: Path) -> None:
    run = fit(GradualMagnitudePruning(OneShot(0.7)))
    run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert same(dict(fit(FixedMasks(str(tmp_path / "run.ckpt"))).callback.masks), dict(run.callback.masks))


def test_they_come_from_a_module_pruned_with_torch() -> None:
    module = TinyModule()
    torch_prune.l1_unstructured(module.head, "weight", amount=0.5)
    masks = masks_of(module)
    torch_prune.remove(module.head, "weight")
    run = fit(FixedMasks(masks), make=lambda: module)
    assert same(dict(run.callback.masks), masks)
    assert set(masks) == {"head.weight"}
    assert int(masks["head.weight"].sum()) == 24


def test_a_module_without_pruned_parameters_has_no_masks() -> None:
    with pytest.raises(ValueError, match="No parameter of TinyModule is pruned"):
        masks_of(TinyModule())


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors does not exist"):
        FixedMasks(tmp_path / "no.safetensors")


def test_a_dense_checkpoint_has_no_masks(tmp_path: Path) -> None:
    run = fit()
    run.trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match="holds the masks of 0 sparsity callbacks"):
        FixedMasks(tmp_path / "dense.ckpt")


def test_a_weights_file_has_no_masks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"head.weight": torch.ones(3, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no masks"):
        FixedMasks(tmp_path / "model.safetensors")


def test_masks_that_are_not_bool_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.bool"):
        FixedMasks({"head.weight": torch.ones(3, 16)})


def test_masks_of_another_shape_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(4, 16\) there and \(3, 16\) here"):
        fit(FixedMasks({"head.weight": torch.ones(4, 16, dtype=torch.bool)}))


def test_masks_of_unknown_parameters_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"'tail.weight' matches no parameter. Near names: 'head.weight'"):
        fit(FixedMasks({"tail.weight": torch.ones(3, 16, dtype=torch.bool)}))
