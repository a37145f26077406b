import copy
import random

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from sparsetrain.callbacks.probe import Probe, is_elementwise, probe_optimizer

SHAPES = [(7,), (5, 7), (4, 3, 3), (4, 3, 3, 3), (2, 2, 3, 3, 3)]
PRESERVING = [
    (torch.optim.ASGD, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (torch.optim.Rprop, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
TIMM_PRESERVING = (
    "adabelief",
    "adamp",
    "adan",
    "adopt",
    "lamb",
    "lars",
    "lion",
    "madgrad",
    "nadamw",
    "rmsproptf",
    "sgdp",
)
TIMM_MOVING = ["muon", "adamuon", "nadamuon", "adahessian", "lookahead_adam"]


def parameter(shape=(5, 7)):
    return nn.Parameter(torch.ones(shape))


def probe(make, shape=(5, 7), **settings):
    weight = parameter(shape)
    return probe_optimizer(make([weight], **{"lr": 0.01, **settings}), weight)


def timm_probe(name):
    module = nn.Linear(7, 5)
    return probe_optimizer(create_optimizer_v2(module, name, lr=0.01, weight_decay=0.05), module.weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("make", "settings"), PRESERVING, ids=lambda value: getattr(value, "__name__", ""))
def test_elementwise_optimizers_of_torch_preserve_zero(make, settings, shape):
    assert probe(make, shape, **settings).preserves_zero


@pytest.mark.parametrize("name", TIMM_PRESERVING)
def test_elementwise_optimizers_of_timm_preserve_zero(name):
    assert timm_probe(name).preserves_zero


def test_muon_moves_zeros():
    assert probe(torch.optim.Muon) == Probe(preserves_zero=False, fresh={})


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_that_cannot_be_tried_is_taken_to_move_zeros(make):
    assert probe(make) == Probe(preserves_zero=False, fresh={})


@pytest.mark.parametrize("name", TIMM_MOVING)
def test_optimizers_of_timm_that_move_zeros_or_cannot_be_tried_do_not_preserve_zero(name):
    assert not timm_probe(name).preserves_zero


@pytest.mark.slow  # Kron compiles its step
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning:timm")
def test_kron_moves_zeros():
    assert not timm_probe("kron").preserves_zero


def test_every_optimizer_of_torch_is_in_these_tests():
    known = {make for make, _ in PRESERVING} | {torch.optim.Muon, torch.optim.LBFGS, torch.optim.SparseAdam}
    every = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert every - {torch.optim.Optimizer} == known


def moved_by_muon(pruned):
    """Whether four steps of Muon with masked gradients move the pruned weights of a square toy."""
    torch.manual_seed(0)
    toy = nn.Parameter(torch.randn(6, 6).masked_fill(pruned, 0))
    optimizer = torch.optim.Muon([toy], lr=0.1)
    for _ in range(4):
        toy.grad = torch.randn(6, 6).masked_fill(pruned, 0)
        optimizer.step()
    return bool((toy[pruned] != 0).any())


def test_a_toy_with_whole_rows_or_columns_pruned_would_call_muon_safe():
    columns = torch.zeros(6, 6, dtype=torch.bool)
    columns[:, ::2] = True
    assert not moved_by_muon(columns)
    assert not moved_by_muon(columns.t())
    scattered = columns.clone()
    scattered[0, 0] = False
    assert moved_by_muon(scattered)


@pytest.mark.parametrize(
    ("make", "settings", "fresh"),
    [
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}, {"sum": 0.3}),
        (torch.optim.Rprop, {"lr": 0.02}, {"prev": 0.0, "step_size": 0.02}),
        (torch.optim.Adam, {}, {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer": 0.0}),
        (torch.optim.SGD, {}, {}),
        (torch.optim.Muon, {}, {}),
    ],
)
def test_fresh_is_the_state_where_nothing_happened(make, settings, fresh):
    assert probe(make, **settings).fresh == pytest.approx(fresh)


def test_fresh_is_not_zero_for_timm_rmsprop_that_begins_at_one():
    assert 0.85 < timm_probe("rmsproptf").fresh["square_avg"] <= 1.0


@pytest.mark.parametrize(("make", "settings"), PRESERVING, ids=lambda value: getattr(value, "__name__", ""))
def test_fresh_names_entries_that_the_optimizer_really_has(make, settings):
    weight = parameter()
    optimizer = make([weight], lr=0.01, **settings)
    fresh = probe_optimizer(optimizer, weight).fresh
    with torch.no_grad():
        weight.zero_()  # as a pruned weight is: ASGD keeps its average, others add its decay to the gradient
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[weight].items() if is_elementwise(value, weight)}
    assert fresh.keys() == state.keys()
    for key, value in state.items():
        assert fresh[key] == pytest.approx(float(value[0, 0]))


def test_the_global_random_streams_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for make in (torch.optim.AdamW, torch.optim.Muon, torch.optim.LBFGS):
        probe(make)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_optimizer_and_its_weight_are_left_alone():
    weight, other = parameter(), parameter((3,))
    groups = [{"params": [other], "lr": 0.5}, {"params": [weight], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), weight.detach(), weight.grad))
    held = list(optimizer.state)
    assert probe_optimizer(optimizer, weight).preserves_zero
    state, value, grad = before
    assert torch.equal(weight, value)
    assert torch.equal(weight.grad, grad)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert all(one is two for one, two in zip(optimizer.state, held, strict=True))
    for key, entry in state["state"][1].items():
        assert torch.equal(optimizer.state[weight][key], entry)


def test_the_hyperparameters_are_those_of_the_group_of_the_weight():
    first, second = parameter(), parameter()
    groups = [{"params": [first]}, {"params": [second], "initial_accumulator_value": 0.7}]
    optimizer = torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.2)
    for weight in (first, second):
        fresh = optimizer.state[weight]["sum"]
        assert probe_optimizer(optimizer, weight).fresh["sum"] == pytest.approx(float(fresh[0, 0]))


@pytest.mark.parametrize(("make", "preserves"), [(torch.optim.SGD, True), (torch.optim.Muon, False)])
def test_a_warm_up_from_a_rate_of_zero_does_not_hide_what_the_optimizer_does(make, preserves):
    weight = parameter()
    optimizer = make([weight], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert probe_optimizer(optimizer, weight).preserves_zero is preserves
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("scheduler", [torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CosineAnnealingLR])
def test_what_a_scheduler_leaves_in_the_groups_does_not_matter(scheduler):
    weight = parameter()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scheduler(optimizer, *([0.1, 10] if scheduler is torch.optim.lr_scheduler.OneCycleLR else [10]))
    assert probe_optimizer(optimizer, weight).preserves_zero


def test_an_optimizer_that_grows_zeros_is_found_out_at_any_rank():
    class Drift(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.add_(weight.grad.mean())

    assert not any(probe(Drift, shape).preserves_zero for shape in SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_toy_has_the_type_of_the_weight(dtype):
    seen = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            seen.extend((w.dtype, w.dim()) for group in self.param_groups for w in group["params"])
            return super().step(closure)

    weight = nn.Parameter(torch.ones(2, 3, 4, dtype=dtype))
    assert probe_optimizer(Watch([weight], lr=0.1), weight).preserves_zero
    assert set(seen) == {(dtype, 3)}
