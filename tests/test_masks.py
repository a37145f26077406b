import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsetrain.allocation import ERK, LAMP, Global, Uniform
from sparsetrain.criteria import Criterion, Magnitude, Movement, Random, Saliency
from sparsetrain.masks import Masks, Pruning, load_masks, pack, prune, save_masks, unpack
from sparsetrain.models.cifar_resnet import resnet20
from sparsetrain.selection import Selection, first_and_last
from sparsetrain.stats import Stats


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(7, 5)
    )


NAMES, TOTAL = ["0.weight", "3.weight"], 3 * 4 * 9 + 7 * 5


def bound(module, pruning=Pruning()):
    masks = Masks(pruning)
    masks.bind(module)
    return masks


def jiggle(module, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=stream), alpha=0.1)


def set_grads(module, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=stream).to(
            memory_format=torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
        )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copies(masks):
    return {name: mask.clone() for name, mask in masks.items()}


def test_masks_are_empty_until_bound_and_then_all_true():
    masks = Masks()
    assert len(masks) == 0
    masks.bind(net())
    assert list(masks) == list(masks.keys()) == NAMES
    assert all(mask.dtype == torch.bool and mask.all() for mask in masks.values())
    assert (masks.sparsity(), masks.total) == (0.0, TOTAL)


def test_the_plan_names_every_parameter_and_the_pruned_ones_are_the_masks():
    module = net()
    masks = bound(module)
    assert [row.name for row in masks.plan] == [name for name, _ in module.named_parameters()]
    assert [row.name for row in masks.plan if row.pruned] == list(masks)


@pytest.mark.parametrize("allocation", [Global(), Uniform(), ERK(), LAMP()], ids=repr)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.8, 0.951, 0.98])
def test_the_count_kept_is_exact(sparsity, allocation):
    masks = bound(net(), Pruning(allocation=allocation))
    update = masks.update(sparsity)
    kept = TOTAL - math.floor(sparsity * TOTAL + 0.5)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept == sum(masks.kept.values())
    assert masks.sparsity() == pytest.approx(1 - kept / TOTAL, abs=1e-12)
    assert min(masks.kept.values()) >= 1
    assert update.kept == masks.kept


def test_the_largest_weights_of_all_tensors_are_kept():
    module = net()
    masks = bound(module)
    masks.update(0.7)
    scores = torch.cat([module.get_parameter(name).detach().abs().flatten() for name in NAMES])
    joined = torch.cat([masks[name].flatten() for name in NAMES])
    assert scores[joined].min() > scores[~joined].max()


def test_an_update_says_what_it_dropped_and_grew():
    module = net()
    masks = bound(module)
    first = masks.update(0.5, step=3)
    assert (first.step, first.target) == (3, 0.5)
    assert sum(first.dropped.values()) == TOTAL // 2 + 1
    assert set(first.grown.values()) == {0}
    before = copies(masks)
    jiggle(module)
    second = masks.update(0.5, regrow=True, step=4)
    for name, mask in masks.items():
        assert second.dropped[name] == int((before[name] & ~mask).sum())
        assert second.grown[name] == int((mask & ~before[name]).sum())
    assert 0 < sum(second.grown.values()) == sum(second.dropped.values())


def test_without_regrow_masks_only_shrink_however_large_pruned_weights_are():
    module = net()
    masks = bound(module)
    for sparsity in (0.2, 0.2, 0.5, 0.9):
        before = copies(masks)
        masks.update(sparsity)
        assert not any((masks[name] & ~before[name]).any() for name in NAMES)
        for name in NAMES:
            module.get_parameter(name).data[~masks[name]] = 1e6


def test_with_regrow_pruned_weights_compete_again():
    module = net()
    masks = bound(module)
    masks.update(0.5)
    pruned = {name: ~mask for name, mask in masks.items()}
    for name in NAMES:
        module.get_parameter(name).data[pruned[name]] = 1e6
    masks.update(0.5, regrow=True)
    assert sum(int((masks[name] & pruned[name]).sum()) for name in NAMES) == TOTAL - TOTAL // 2 - 1
    masks.update(0.0, regrow=True)
    assert masks.sparsity() == 0.0


def test_a_falling_sparsity_without_regrow_is_an_error_and_nothing_changes():
    masks = bound(net())
    masks.update(0.5)
    before = copies(masks)
    with pytest.raises(ValueError, match=r"0\.4 lies below the present 0\.50.*pass regrow=True"):
        masks.update(0.4)
    assert same(masks, before)


def test_masks_have_the_strides_of_their_weights_and_keep_their_storage():
    module = net()
    masks = bound(module)
    places = {name: mask.data_ptr() for name, mask in masks.items()}
    for sparsity in (0.3, 0.6):
        masks.update(sparsity)
        masks.apply_()
        for name, mask in masks.items():
            assert mask.stride() == module.get_parameter(name).stride()
            assert mask.data_ptr() == places[name]


def test_random_masks_do_not_depend_on_the_memory_format():
    module, plain = net(), net().to(memory_format=torch.contiguous_format)
    pruning = Pruning(criterion=Random(3))
    assert same(prune(module, 0.7, pruning), prune(plain, 0.7, pruning))


def test_random_masks_differ_between_steps_and_seeds():
    def at(seed, step):
        masks = bound(net(), Pruning(criterion=Random(seed)))
        masks.update(0.5, step=step)
        return masks

    assert same(at(0, 0), at(0, 0))
    assert not same(at(0, 0), at(0, 1))
    assert not same(at(0, 0), at(1, 0))


def test_apply_makes_pruned_weights_plus_zero_even_nan_and_leaves_the_others():
    module = net()
    masks = bound(module)
    masks.update(0.6)
    before = copy.deepcopy(module)
    for name, value in zip(NAMES, (math.nan, -0.0), strict=True):
        module.get_parameter(name).data[~masks[name]] = value
    masks.apply_()
    for name, parameter in module.named_parameters():
        kept = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[kept], before.get_parameter(name)[kept])
        assert (parameter[~kept] == 0).all()
        assert not torch.signbit(parameter[~kept]).any()


def test_multiply_zeroes_the_named_weights_alone():
    module = net()
    masks = bound(module)
    masks.update(0.6)
    dense = {name: module.get_parameter(name).detach().clone() for name in NAMES}
    masks.multiply_(NAMES[1:])
    assert torch.equal(module.get_parameter(NAMES[0]), dense[NAMES[0]])
    assert torch.equal(module.get_parameter(NAMES[1]), dense[NAMES[1]] * masks[NAMES[1]])
    masks.multiply_([])


def test_gradients_of_pruned_weights_become_zero_and_missing_ones_stay_missing():
    module = net()
    masks = bound(module)
    masks.update(0.6)
    masks.zero_grads_()
    assert all(parameter.grad is None for parameter in module.parameters())
    set_grads(module)
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    masks.zero_grads_(NAMES[:1])
    masks.zero_grads_()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, before[name] * masks[name] if name in masks else before[name])


def test_a_revived_weight_is_seen():
    module = net()
    masks = prune(module, 0.5)
    assert not any(bool(masks.revived(name)) for name in NAMES)
    module.get_parameter(NAMES[1]).data.view(-1)[int((~masks[NAMES[1]]).flatten().nonzero()[0])] = 1e-30
    assert [bool(masks.revived(name)) for name in NAMES] == [False, True]


def test_a_parameter_that_is_replaced_is_found_by_name():
    module = net()
    masks = prune(module, 0.5)
    module[3].weight = nn.Parameter(torch.ones(5, 7))
    masks.apply_()
    assert torch.equal(module[3].weight, masks["3.weight"].float())


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_scores_that_are_not_finite_are_an_error_that_leaves_all_masks(name, value):
    module = net()
    masks = prune(module, 0.5)
    before = copies(masks)
    weight = module.get_parameter(name)
    weight.data[(0,) * weight.dim()] = value
    with pytest.raises(RuntimeError, match=f"The scores of '{name}' at step 7 are not all finite.*Lower the learning"):
        masks.update(0.8, step=7)
    assert same(masks, before)
    assert masks.sparsity() == pytest.approx(0.5, abs=0.01)


def test_finite_scores_whose_sum_overflows_are_accepted():
    module = nn.Linear(8, 8)
    module.weight.data.fill_(3e38)
    assert prune(module, 0.5).sparsity() == 0.5


def test_a_missing_gradient_is_an_error_that_names_the_tensor():
    module = net()
    set_grads(module)
    module.get_parameter("3.weight").grad = None
    masks = bound(module, Pruning(criterion=Saliency()))
    with pytest.raises(RuntimeError, match=r"Saliency needs the gradient of '3.weight', which has none at step 5"):
        masks.update(0.5, step=5)
    assert masks.sparsity() == 0.0


def test_an_update_before_bind_is_an_error():
    with pytest.raises(RuntimeError, match=r"Call masks.bind\(module\) first"):
        Masks().update(0.5)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, 80])
def test_what_is_no_sparsity_is_an_error(sparsity):
    with pytest.raises(ValueError, match="is no sparsity"):
        bound(net()).update(sparsity)


def test_floors_that_exceed_what_is_kept_are_an_error_that_leaves_all_masks():
    masks = bound(net(), Pruning(allocation=Global(floor=20)))
    masks.update(0.5)
    before = copies(masks)
    with pytest.raises(ValueError, match="keeps at least 40 in 2 tensors"):
        masks.update(0.9)
    assert same(masks, before)


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


@dataclass(frozen=True)
class Negative(Criterion):
    """-|w|: the smallest weights are kept."""

    def score(self, weight, evidence, *, name, step):
        return -weight.abs()


def test_any_criterion_of_one_method_fits():
    module = net()
    scores = torch.cat([module.get_parameter(name).detach().abs().flatten() for name in NAMES])
    masks = prune(module, 0.5, Pruning(criterion=Negative()))
    joined = torch.cat([masks[name].flatten() for name in NAMES])
    assert scores[joined].max() < scores[~joined].min()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allocation", [Global(), LAMP()], ids=repr)
def test_weights_of_any_float_type_are_pruned_exactly(dtype, allocation):
    module = net().to(dtype)
    masks = prune(module, 0.75, Pruning(allocation=allocation))
    assert sum(masks.kept.values()) == TOTAL - math.floor(0.75 * TOTAL + 0.5)
    assert all((module.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())


def test_models_of_mixed_precision_are_ranked_together():
    module = net()
    module[3].double()
    masks = bound(module)
    masks.update(0.6)
    scores = torch.cat([module.get_parameter(name).detach().double().abs().flatten() for name in NAMES])
    joined = torch.cat([masks[name].flatten() for name in NAMES])
    assert scores[joined].min() > scores[~joined].max()


def test_prune_makes_a_real_network_sparse_once():
    torch.manual_seed(0)
    module = resnet20()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    masks = prune(module, 0.9, Pruning(Selection(exclude=first_and_last())))
    pruned = {row.name for row in masks.plan if row.pruned}
    total = sum(before[name].numel() for name in pruned)
    assert total > 250_000
    assert sum(int((module.get_parameter(name) == 0).sum()) for name in pruned) == math.floor(0.9 * total + 0.5)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name] * masks[name] if name in masks else before[name])
    assert module.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_prune_takes_statistics():
    module = nn.Linear(4, 1, bias=False)
    stats = Stats(Movement.needs)
    stats.observe_step("weight", torch.ones(1, 4), torch.tensor([[1.0, -1.0, 2.0, -2.0]]))
    masks = prune(module, 0.5, Pruning(criterion=Movement()), stats=stats)
    assert masks["weight"].tolist() == [[False, True, False, True]]


def test_prune_that_fails_leaves_the_weights():
    module = net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="needs the gradient"):
        prune(module, 0.5, Pruning(criterion=Saliency()))
    assert same(module.state_dict(), before)


class PeakBytes(TorchDispatchMode):
    """Most bytes that were alive at once in storages made under this mode, seen after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_the_peak_is_measured_right():
    with PeakBytes() as memory:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(2000) + 1
        kept.add_(1)
    assert memory.peak == 4 * (1000 + 2000 + 2000)


@pytest.mark.parametrize("criterion", [Magnitude(), Random()], ids=repr)
def test_an_update_of_four_million_weights_takes_little_memory(criterion):
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(16)])
    masks = bound(module, Pruning(criterion=criterion))
    for sparsity in (0.5, 0.9):
        with PeakBytes() as memory:
            masks.update(sparsity)
        assert memory.peak / masks.total <= 1.3
