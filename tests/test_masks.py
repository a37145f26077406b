import copy
import math
from dataclasses import dataclass

import pytest
import torch
from mask_network import NAMES, TOTAL, bound, copies, jiggle, net, same, set_grads
from torch import nn

from sparsetrain.allocation import ERK, LAMP, Global, Uniform
from sparsetrain.criteria import Criterion, Movement, Random, Saliency
from sparsetrain.masks import Masks, Pruning, prune
from sparsetrain.models.cifar_resnet import resnet20
from sparsetrain.patterns import NM
from sparsetrain.selection import Selection, first_and_last
from sparsetrain.stats import Stats


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


@pytest.mark.parametrize("use", [lambda masks: masks.update(0.5), Masks.sparsity])
def test_use_before_bind_is_an_error(use):
    with pytest.raises(RuntimeError, match=r"Call masks.bind\(module\) first"):
        use(Masks())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_parameters_without_elements_have_no_sparsity():
    masks = prune(nn.Linear(0, 4), 0.5)
    assert (masks.sparsity(), masks.total) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.cfloat, torch.uint8])
def test_parameters_of_other_than_real_numbers_are_refused(dtype):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    module[1].weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=dtype.is_complex)
    with pytest.raises(ValueError, match=rf"'1\.weight' is {dtype}; masks are for .*Add it to `exclude`"):
        Masks().bind(module)
    assert list(prune(module, 0.5, Pruning(Selection(exclude=("1.weight",))))) == ["0.weight"]


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


def observed(module, names=NAMES, value=1.0):
    stats = Stats(Movement.needs)
    for name in names:
        weight = module.get_parameter(name)
        stats.observe_step(name, weight, torch.full_like(weight, value))
    return stats


@pytest.mark.parametrize("names", [[], NAMES[:1]])
def test_pruning_by_movement_without_an_observed_step_is_an_error_that_names_the_tensor(names):
    module = net()
    before = copy.deepcopy(module.state_dict())
    message = f"Movement needs steps of '{NAMES[len(names)]}' with a gradient, and none was observed before step 0"
    with pytest.raises(RuntimeError, match=message + r".*Prune later.* give `prune` stats.*add it to `exclude`"):
        prune(module, 0.5, Pruning(criterion=Movement()), stats=observed(module, names))
    assert same(module.state_dict(), before)


def test_scores_of_zero_after_an_observed_step_are_accepted():
    module = net()
    masks = prune(module, 0.5, Pruning(criterion=Movement()), stats=observed(module, value=0.0))
    assert sum(masks.kept.values()) == TOTAL // 2


@pytest.mark.parametrize("regrow", [False, True])
def test_an_update_that_prunes_nothing_needs_no_observed_step(regrow):
    masks = bound(net(), Pruning(criterion=Movement()))
    masks.update(0.0, regrow=regrow)
    assert masks.sparsity() == 0.0


def test_a_trial_needs_no_observed_step():
    masks = bound(net(), Pruning(criterion=Movement()))
    masks.update(0.5, trial=True)
    assert sum(masks.kept.values()) == TOTAL // 2


def test_a_pattern_that_prunes_at_a_sparsity_of_zero_needs_an_observed_step():
    module = nn.Linear(8, 4)
    masks = bound(module, Pruning(criterion=Movement(), pattern=NM(2, 4)))
    with pytest.raises(RuntimeError, match="Movement needs steps of 'weight' with a gradient"):
        masks.update(0.0)
    assert masks.sparsity() == 0.0
    masks.stats = observed(module, ["weight"])
    masks.update(0.0)
    assert masks.sparsity() == 0.5


def test_a_loaded_state_knows_which_parameters_were_observed():
    module = net()
    for names in ([], NAMES[:1], NAMES):
        first, second = bound(module, Pruning(criterion=Movement())), bound(module, Pruning(criterion=Movement()))
        first.stats = observed(module, names)
        first.update(0.0)
        second.load_state_dict(first.state_dict())
        assert [name for name in NAMES if second.stats.observed(name)] == names


def test_prune_that_fails_leaves_the_weights():
    module = net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="needs the gradient"):
        prune(module, 0.5, Pruning(criterion=Saliency()))
    assert same(module.state_dict(), before)
