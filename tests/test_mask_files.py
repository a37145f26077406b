import copy
import math
import pickle

import pytest
import torch
from mask_network import NAMES, bound, net, same, set_grads
from safetensors.torch import save_file
from torch import nn

from sparsetrain.criteria import Movement
from sparsetrain.mask_files import load_masks, pack, save_masks, unpack
from sparsetrain.masks import Masks, Pruning, prune


@pytest.mark.parametrize("size", [0, *range(1, 18), 1000])
def test_packed_masks_take_one_bit_a_weight_and_come_back(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == math.ceil(size / 8)
    assert torch.equal(unpack(bits, mask.shape), mask)


def test_bits_are_in_row_major_order_whatever_the_strides():
    mask = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    written = "".join("01"[bit] for bit in mask.flatten().tolist()).ljust(304, "0")
    expected = [int(written[i : i + 8], 2) for i in range(0, 304, 8)]
    assert pack(mask).tolist() == expected
    assert pack(mask.to(memory_format=torch.channels_last)).tolist() == expected


def test_saved_masks_come_back_from_a_file_of_one_bit_a_weight(tmp_path):
    module = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(3, 5, 3))
    masks = prune(module, 0.8)
    path = tmp_path / "masks.safetensors"
    save_masks(masks, path)
    assert same(load_masks(path), dict(masks))
    assert path.stat().st_size < masks.total / 8 + 1000


def test_another_file_holds_no_masks(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors holds no masks. Write them with save_masks"):
        load_masks(tmp_path / "weights.safetensors")


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks({"a": torch.ones(100, dtype=torch.bool)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"masks.safetensors is no whole safetensors file \(.*\). Write it with save_masks"
    ):
        load_masks(path)


def test_a_state_dict_loads_safely_and_is_packed(tmp_path):
    module = net()
    set_grads(module)
    masks = bound(module, Pruning(criterion=Movement()))
    for name in NAMES:
        masks.stats.observe_step(name, module.get_parameter(name), module.get_parameter(name).grad)
    masks.update(0.5)
    torch.save(masks.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert sum(bits.numel() for bits in state["masks"].values()) == math.ceil(108 / 8) + math.ceil(35 / 8)
    other = bound(net(1), Pruning(criterion=Movement()))
    other.load_state_dict(state)
    assert same(other, masks)
    assert (other.kept, other.checksum()) == (masks.kept, masks.checksum())


@pytest.mark.parametrize("before_bind", [True, False])
def test_a_loaded_state_continues_like_the_saved_one_and_leaves_weights_alone(before_bind):
    def make(module):
        masks = Masks(Pruning(criterion=Movement()))
        if before_bind:
            masks.load_state_dict(state)
        masks.bind(module)
        if not before_bind:
            masks.load_state_dict(state)
        return masks

    module = net()
    first = bound(module, Pruning(criterion=Movement()))
    for step in range(3):
        set_grads(module, step)
        for name in NAMES:
            first.stats.observe_step(name, module.get_parameter(name), module.get_parameter(name).grad)
    first.update(0.4)
    first.apply_()
    state, twin = pickle.loads(pickle.dumps(first.state_dict())), copy.deepcopy(module)
    second = make(twin)
    assert all(torch.equal(twin.get_parameter(n), p) for n, p in module.named_parameters())
    for masks, owner in ((first, module), (second, twin)):
        set_grads(owner, 9)
        for name in NAMES:
            masks.stats.observe_step(name, owner.get_parameter(name), owner.get_parameter(name).grad)
        masks.update(0.8)
    assert same(first, second)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), r"none for \[\], and \['3.weight'\] are not pruned here"),
        (lambda: nn.Sequential(*net(), nn.Linear(2, 2)), r"none for \['4.weight'\], and \[\] are not"),
        (lambda: nn.Sequential(*net()[:3], nn.Linear(5, 7)), r"'3.weight' has shape \(5, 7\) there and \(7, 5\) here"),
    ],
)
@pytest.mark.parametrize("before_bind", [True, False])
def test_masks_of_another_model_are_an_error_that_names_the_tensor_and_changes_nothing(other, message, before_bind):
    state = prune(net(), 0.5).state_dict()
    masks = Masks()
    if before_bind:
        masks.load_state_dict(state)
        with pytest.raises(ValueError, match=f"The saved masks belong to another model.*{message}"):
            masks.bind(other())
    else:
        masks.bind(other())
        with pytest.raises(ValueError, match=f"The saved masks belong to another model.*{message}"):
            masks.load_state_dict(state)
    assert masks.sparsity() == 0.0


def test_given_masks_replace_the_old_ones_and_count():
    masks = bound(net())
    given = {name: torch.zeros(mask.shape, dtype=torch.bool) for name, mask in masks.items()}
    given["3.weight"][0, 0] = True
    masks.replace(given, "The given masks")
    assert same(masks, given)
    assert masks.kept == {"0.weight": 0, "3.weight": 1}
    given["3.weight"].fill_(True)
    assert masks["3.weight"].sum() == 1


def test_the_checksum_differs_on_one_flipped_bit_and_on_a_name():
    masks = prune(net(), 0.5)
    checksums = {masks.checksum()}
    for name in NAMES:
        for index in range(3):
            flipped = masks[name].view(-1) if masks[name].is_contiguous() else masks[name].permute(0, 2, 3, 1).view(-1)
            flipped[index] ^= True
            checksums.add(masks.checksum())
            flipped[index] ^= True
    assert len(checksums) == 7
    assert masks.checksum() in checksums
    assert all(0 <= checksum < 2**63 for checksum in checksums)
    assert bound(nn.Sequential(nn.Linear(2, 2))).checksum() != bound(nn.ModuleDict({"a": nn.Linear(2, 2)})).checksum()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_apply_to_replaces_tensors_and_writes_to_none(prefix):
    module = net()
    masks = bound(module)
    masks.update(0.5)
    dense = {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in dense.items()}
    originals = dict(state)
    masks.apply_to(state, prefix)
    assert state.keys() == dense.keys()
    for name, tensor in state.items():
        short = name.removeprefix(prefix)
        assert torch.equal(originals[name], dense[name])
        assert torch.equal(tensor, dense[name] * masks[short] if short in masks else dense[name])
    sparse = dict(state)
    masks.apply_to(state, prefix)
    assert all(state[name] is sparse[name] for name in state)


def test_apply_to_zeroes_a_tied_weight_under_each_of_its_names():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    masks = bound(module)
    masks.update(0.5)
    averaged = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    masks.apply_to(averaged)
    module.load_state_dict(averaged)
    assert not masks.revived("0.weight")
    assert torch.equal(averaged["0.weight"], averaged["1.weight"])


def test_apply_to_takes_a_part_of_a_state_dict():
    masks = prune(net(), 0.5)
    state = {"3.weight": torch.ones(5, 7), "other": torch.ones(2)}
    masks.apply_to(state)
    assert torch.equal(state["3.weight"], masks["3.weight"].float())
    assert state["other"].tolist() == [1, 1]
