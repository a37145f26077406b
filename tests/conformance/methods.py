"""The table of methods: a method that has a row here is held to every claim of this folder."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conformance.harness import TinyModule

from sparsetrain import (
    ERK,
    LAMP,
    BidirectionalWeightPruning,
    Channel,
    Cubic,
    FixedMasks,
    Global,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    LastLR,
    LotteryTicketRewinding,
    Movement,
    OneShot,
    PolarizationGating,
    Pruning,
    Random,
    Saliency,
    Selection,
    SparseModelSoup,
    SparsityCallback,
    StraightThroughNM,
    Ticket,
    Uniform,
    Vary,
    prune,
)
from sparsetrain.callbacks import LinearWeight
from sparsetrain.snapshot import Snapshot


@dataclass(frozen=True)
class Method:
    """One callback, set up for the task of `harness`.

    Args:
        name: what the tests' names say.
        make: a new callback; takes `check`.
        sparsity: of the trained network, over the maskable weights.
        regrow: whether pruned weights may come back.
        converts: whether it changes layers, so that what copies the module must come after it.
        many_rounds: whether it refuses what mixes the weights of different rounds.
        gated_until: the step before which gates take part in what the network computes.
    """

    name: str
    make: Callable[..., SparsityCallback]
    sparsity: float
    regrow: bool = False
    converts: bool = False
    many_rounds: bool = False
    gated_until: int = 0


# Without the convolution: a pruned filter emits its batch norm's shift, and where that falls below 0 the ReLU behind it
# keeps the filter at zero in all training, also in training without the method.
WHOLE = Pruning(Selection(exclude=("body.0.weight",)), allocation=Uniform(), pattern=Channel())
CHANNELS = 1 - (3 * 64 + 16) / 1072  # leaves 3 of 16 rows and 1 of 3 of `TinyModule`
RAMP = Cubic(0.8, begin="0.1run", end="0.7run", every="2it")


def gradual(pruning: Pruning, schedule: Cubic | OneShot = RAMP) -> Callable[..., SparsityCallback]:
    return lambda **settings: GradualMagnitudePruning(schedule, pruning=pruning, **settings)


def fixed(**settings: str) -> FixedMasks:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        masks = prune(TinyModule(), 0.7)
    return FixedMasks(dict(masks), **settings)


def rounds(count: int, length: str, **choices: Any) -> Callable[..., SparsityCallback]:
    return lambda **settings: IterativeMagnitudePruning(count, length, sparsity=0.8, **choices, **settings)


def lottery(**settings: str) -> LotteryTicketRewinding:
    return LotteryTicketRewinding(2, "1ep", rewind_to="0ep", sparsity=0.8, **settings)


def soup(**settings: str) -> SparseModelSoup:
    vary = Vary(weight_decay=(1e-3, 1e-2), lr=(0.2, 0.1))
    return SparseModelSoup(1, "1ep", sparsity=0.8, ingredients=2, vary=vary, **settings)


def ticket(**settings: str) -> LotteryTicketRewinding:
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(12)
        found = TinyModule()
        Ticket(Snapshot.of(found), prune(found, 0.7), origin="").save(f"{folder}/ticket.safetensors")
        # Four epochs, of which the first is skipped.
        return LotteryTicketRewinding(
            0, "4ep", rewind_to="1ep", ticket=f"{folder}/ticket.safetensors", control="random_mask", **settings
        )


def n_of_m(method: Callable[..., SparsityCallback], *numbers: int, **choices: Any) -> Callable[..., SparsityCallback]:
    return lambda check="full": method(*numbers, **choices)  # masks are functions of the weights: nothing to check


def polarization(**settings: str) -> PolarizationGating:
    # Static gates, and quick ones: all close before the extraction, of which the budget closes half. Those that look at
    # the input would be undecided after so few steps, and warned of.
    return PolarizationGating(
        sparsity=0.3,
        extract_at=8,
        polarization=LinearWeight(1.0, 0, 6),
        begin=0,
        end=4,
        budget=10.0,
        gate_lr=0.5,
        hidden=None,
        input_shape=(1, 4, 4),
        where=Selection(include=("body.5.weight",)),
        **settings,
    )


METHODS = (
    Method("gradual", gradual(Pruning()), 0.8),
    Method("saliency_uniform", gradual(Pruning(criterion=Saliency(), allocation=Uniform())), 0.8),
    Method("movement_erk", gradual(Pruning(criterion=Movement(), allocation=ERK())), 0.8),
    Method("one_shot_lamp", gradual(Pruning(allocation=LAMP()), OneShot(0.9, at="0.4run")), 0.9),
    Method("random_floor", gradual(Pruning(criterion=Random(5), allocation=Global(floor=8))), 0.8),
    Method("channels", gradual(WHOLE, OneShot(CHANNELS, at="0.4run")), CHANNELS),
    Method("fixed", fixed, 0.7),
    Method("rounds", rounds(2, "1ep"), 0.8, many_rounds=True),
    Method(
        "rounds_from_a_snapshot",
        rounds(1, "2ep", weights="rewind", rewind_to="1ep", optimizer_state="snapshot"),
        0.8,
        many_rounds=True,
    ),
    Method("rounds_fine_tuned", rounds(2, "1ep", retrain=LastLR()), 0.8, many_rounds=True),
    Method("lottery", lottery, 0.8, many_rounds=True),
    Method("ticket", ticket, 0.7, many_rounds=True),
    Method("soup", soup, 0.8, many_rounds=True),
    Method("polarization", polarization, 0.5, gated_until=8),
    Method("bidirectional", n_of_m(BidirectionalWeightPruning, decay=1e-2), 0.5, regrow=True, converts=True),
    Method("straight_through", n_of_m(StraightThroughNM, 1, 4, decay=1e-2), 0.75, regrow=True, converts=True),
    Method("transposable", n_of_m(StraightThroughNM, transposable=True, refresh="4it"), 0.5, True, converts=True),
)

CONVERTING = tuple(method for method in METHODS if method.converts)
MANY_ROUNDS = tuple(method for method in METHODS if method.many_rounds)

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
