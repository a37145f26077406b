"""The table of methods: a method that has a row here is held to every claim of this folder."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conformance.harness import TinyModule

from sparsetrain import (
    ERK,
    LAMP,
    Cubic,
    FixedMasks,
    Global,
    GradualMagnitudePruning,
    Movement,
    OneShot,
    Pruning,
    Random,
    Saliency,
    SparsityCallback,
    Uniform,
    prune,
)


@dataclass(frozen=True)
class Method:
    """One callback, set up for the task of `harness`.

    Args:
        name: what the tests' names say.
        make: a new callback; takes `check`.
        sparsity: of the trained network, over the maskable weights.
        regrow: whether pruned weights may come back.
    """

    name: str
    make: Callable[..., SparsityCallback]
    sparsity: float
    regrow: bool = False


RAMP = Cubic(0.8, begin="0.1run", end="0.7run", every="2it")


def gradual(pruning: Pruning, schedule: Cubic | OneShot = RAMP) -> Callable[..., SparsityCallback]:
    return lambda **settings: GradualMagnitudePruning(schedule, pruning=pruning, **settings)


def fixed(**settings: str) -> FixedMasks:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        masks = prune(TinyModule(), 0.7)
    return FixedMasks(dict(masks), **settings)


METHODS = (
    Method("gradual", gradual(Pruning()), 0.8),
    Method("saliency_uniform", gradual(Pruning(criterion=Saliency(), allocation=Uniform())), 0.8),
    Method("movement_erk", gradual(Pruning(criterion=Movement(), allocation=ERK())), 0.8),
    Method("one_shot_lamp", gradual(Pruning(allocation=LAMP()), OneShot(0.9, at="0.4run")), 0.9),
    Method("random_floor", gradual(Pruning(criterion=Random(5), allocation=Global(floor=8))), 0.8),
    Method("fixed", fixed, 0.7),
)

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
