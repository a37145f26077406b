import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.recording import EPOCH, Record, imp, one_round, recorded
from conformance.harness import PlainModule, SaveEverywhere, TinyModule, fit
from timm import scheduler as timm_scheduler
from timm.optim import Adafactor, Lookahead
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer, lr_scheduler

from sparsetrain import AdaptiveLR, CyclicLR, IterativeMagnitudePruning, LastLR, LinearLR, ReplayLR, ScaledLR
from sparsetrain.retrain import DenseRates, PruningStep, Retrain


class Scheduled(TinyModule):
    """With a scheduler made by its class attribute `make`, which takes the optimizer and the module's Trainer."""

    interval = "step"
    frequency = 1

    def make(self, optimizer: Optimizer, steps: int, epochs: int) -> lr_scheduler.LRScheduler:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        scheduler = self.make(optimizer, int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs)
        settings = {"scheduler": scheduler, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": settings}


def scheduled(
    schedule: Callable[[Optimizer, int, int], lr_scheduler.LRScheduler], by: str = "step", every: int = 1
) -> type[Scheduled]:
    class Module(Scheduled):
        interval, frequency = by, every

        def make(self, *args: Any) -> lr_scheduler.LRScheduler:
            return schedule(*args)

    return Module


def warm_up_then_cosine(optimizer: Optimizer, steps: int, epochs: int) -> lr_scheduler.LRScheduler:
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.CosineAnnealingLR(optimizer, steps - 4)], [4])


SCHEDULES = {
    "one_cycle": TinyModule,
    "cosine_by_step": scheduled(lambda optimizer, steps, _: lr_scheduler.CosineAnnealingLR(optimizer, steps)),
    "cosine_by_epoch": scheduled(
        lambda optimizer, _, epochs: lr_scheduler.CosineAnnealingLR(optimizer, epochs), "epoch"
    ),
    "step": scheduled(lambda optimizer, *_: lr_scheduler.StepLR(optimizer, 1, 0.3), "epoch"),
    "multi_step": scheduled(lambda optimizer, *_: lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.3), "epoch"),
    "lambda_warm_up": scheduled(lambda optimizer, *_: lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 8))),
    "sequential": scheduled(warm_up_then_cosine),
}

every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
# SequentialLR calls its own schedulers in a way of which they warn.
ignore_sequential = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")


@pytest.mark.slow
@ignore_sequential
@every_schedule
@pytest.mark.parametrize(("rewind_to", "weights"), [(0, "keep"), (1, "keep"), (1, "rewind")])
def test_each_round_steps_with_exactly_the_rates_of_one_round_from_place_k_on(make, rewind_to, weights):
    whole = list(one_round(make).values())
    _, record = recorded(imp(length="3ep", weights=weights, rewind_to=f"{rewind_to}ep"), make=make)
    assert list(record.rates.values()) == whole + 2 * whole[rewind_to * EPOCH :]
    assert len(set(whole)) >= 2


@pytest.mark.slow
@ignore_sequential
@every_schedule
def test_a_resumed_run_steps_with_the_same_rates(tmp_path, make):
    def callback() -> IterativeMagnitudePruning:
        return imp(length="3ep", rewind_to="1ep")

    saver = SaveEverywhere(tmp_path)
    _, whole = recorded(callback(), saver, make=make)
    chosen = [saved for saved in saver.saved if (saved.batches, saved.moment) in CHOSEN]
    assert len(chosen) == len(CHOSEN)
    for saved in chosen:
        _, part = recorded(callback(), make=make, ckpt_path=saved.path)
        assert part.rates == {place: rates for place, rates in whole.rates.items() if place >= saved.batches}


# In the dense phase, at its end, in round 1, at its end (thrice: before, between and after the schedulers), in round 2.
CHOSEN = {(7, "batch"), (15, "epoch"), (18, "batch"), (25, "batch"), (25, "validation"), (25, "epoch"), (31, "batch")}


@pytest.mark.slow
@ignore_sequential
@every_schedule
@pytest.mark.parametrize("rewind_to", [0, 1])
def test_without_a_dense_phase_the_schedule_is_brought_forward_to_place_k(make, rewind_to):
    whole = list(one_round(make).values())
    _, record = recorded(imp(length="3ep", dense_length="0it", rewind_to=f"{rewind_to}ep"), make=make)
    assert list(record.rates.values()) == 2 * whole[rewind_to * EPOCH :]


@ignore_sequential
@every_schedule
def test_after_a_longer_dense_phase_each_round_replays_the_end_of_its_rates(make):
    whole = list(one_round(make).values())
    _, record = recorded(imp(length="1ep", dense_length="3ep"), make=make)
    assert list(record.rates.values()) == whole + 2 * whole[-EPOCH:]


@pytest.mark.slow
@pytest.mark.parametrize("dense_length", ["4ep", "0it"])
@pytest.mark.parametrize(
    ("by", "every", "accumulate"), [("epoch", 2, 1), ("epoch", 2, 2), ("step", 2, 1), ("step", 3, 1), ("step", 2, 2)]
)
def test_schedulers_that_do_not_step_each_time_replay_the_same_rates(dense_length, by, every, accumulate):
    make = scheduled(lambda optimizer, *_: lr_scheduler.StepLR(optimizer, 1, 0.5), by, every)
    settings = {"accumulate_grad_batches": accumulate}
    whole = list(one_round(make, max_epochs=4, **settings).values())
    tail = whole[2 * len(whole) // 4 :]
    _, record = recorded(imp(length="4ep", dense_length=dense_length, rewind_to="2ep"), make=make, **settings)
    assert list(record.rates.values()) == (whole if dense_length == "4ep" else []) + 2 * tail
    assert len(set(whole)) > 1


@pytest.mark.parametrize(
    ("length", "choices", "by", "every", "message"),
    [
        ("3ep", {}, "epoch", 2, r"StepLR steps every 2 epoch\(s\), and a round of 15 steps, from step 0 of"),
        (
            "3ep",
            {"rewind_to": "1ep", "dense_length": "0it"},
            "epoch",
            2,
            r"a round of 10 steps, from step 5 of the schedule on, does not begin and end with one\. Make both",
        ),
        (7, {}, "epoch", 1, r"steps every 1 epoch\(s\), and a round of 7 steps, .* multiples of 5 steps"),
        (7, {}, "step", 2, r"steps every 2 step\(s\), and a round of 7 steps, .* or let it step at each step\."),
        (
            8,
            {"rewind_to": 3, "dense_length": 0},
            "epoch",
            1,
            r"steps every 1 epoch\(s\), and a round of 5 steps, from step 3 of",
        ),
    ],
)
def test_a_scheduler_whose_steps_do_not_end_with_the_rounds_is_refused(length, choices, by, every, message):
    make = scheduled(lambda optimizer, *_: lr_scheduler.StepLR(optimizer, 1, 0.5), by, every)
    with pytest.raises(ValueError, match=message):
        fit(imp(length=length, **choices), make=make, max_epochs=-1)


def test_schedulers_that_rest_in_rounds_may_step_at_any_time():
    make = scheduled(lambda optimizer, *_: lr_scheduler.StepLR(optimizer, 1, 0.5), "epoch", 1)
    _, record = recorded(imp(length=7, retrain=LastLR()), make=make)
    assert [rate for rate, _ in record.rates.values()] == [0.1] * 5 + [0.05] * 16


def plateau() -> TinyModule:
    return TinyModule(schedule="plateau")


@pytest.mark.parametrize(("rewind_to", "place", "starts"), [("0ep", 0, (15, 30)), ("1ep", 5, (15, 25))])
def test_a_plateau_scheduler_begins_each_round_with_its_state_at_k(rewind_to, place, starts):
    before = Record()
    _, record = recorded(imp(length="3ep", rewind_to=rewind_to), before, make=plateau)
    assert before.starts[starts[0]].schedulers != before.starts[place].schedulers
    for start in starts:
        assert record.starts[start].schedulers == before.starts[place].schedulers
        assert record.rates[start] == record.rates[place]


@pytest.mark.slow
@pytest.mark.parametrize("make", [*SCHEDULES.values(), plateau], ids=[*SCHEDULES, "plateau"])
@ignore_sequential
def test_fine_tuning_steps_with_the_learning_rate_of_the_dense_phases_last_step(make):
    _, record = recorded(imp(length="3ep", retrain=LastLR()), make=make)
    last = record.rates[14][0]
    assert [rate for rate, _ in list(record.rates.values())[15:]] == [last] * 30


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "made"), [("one_cycle", 0.2), ("lambda_warm_up", 0.1), ("step", 0.1)])
def test_without_a_dense_phase_a_policy_goes_on_from_the_rate_the_optimizer_was_made_with(schedule, made):
    for retrain, rate in ((LastLR(), lambda step: made), (LinearLR(), lambda step: made * (5 - step) / 5)):
        _, record = recorded(imp(length="1ep", dense_length="0it", retrain=retrain), make=SCHEDULES[schedule])
        assert [lr for lr, _ in record.rates.values()] == pytest.approx([rate(step % 5) for step in range(10)])


def test_fine_tuning_holds_that_rate_in_resumed_runs_and_gives_the_schedulers_back(tmp_path):
    saver = SaveEverywhere(tmp_path)
    run, whole = recorded(imp(retrain=LastLR()), saver)
    for saved in saver.saved:
        if (saved.batches, saved.moment) in {(8, "batch"), (10, "epoch"), (14, "batch"), (20, "batch")}:
            part, record = recorded(imp(retrain=LastLR()), ckpt_path=saved.path)
            assert record.rates == {place: rates for place, rates in whole.rates.items() if place >= saved.batches}
            assert len(part.trainer.lr_scheduler_configs) == len(run.trainer.lr_scheduler_configs) == 1


@dataclass(frozen=True)
class Falling(Retrain):
    """From the dense phase's last rate linearly down."""

    def rate(self, dense: DenseRates, pruned: PruningStep, step: int, length: int) -> float:
        return dense.last * (length - step) / length


@pytest.mark.parametrize(
    ("choices", "settings", "trained"),
    [
        ({"length": "2ep"}, {}, 10),
        ({"length": "2ep", "dense_length": "1ep"}, {}, 10),
        ({"length": "7it", "rewind_to": "3it"}, {}, 4),
        ({"length": "2ep"}, {"accumulate_grad_batches": 2}, 6),
    ],
)
def test_a_policy_of_ones_own_sets_the_rate_of_each_step_of_each_round(tmp_path, choices, settings, trained):
    def callback() -> IterativeMagnitudePruning:
        return imp(retrain=Falling(), **choices)

    saver = SaveEverywhere(tmp_path)
    _, record = recorded(callback(), saver, **settings)
    rates = [rate for rate, _ in record.rates.values()]
    last = rates[-2 * trained - 1]
    assert rates[-2 * trained :] == 2 * [last * (trained - step) / trained for step in range(trained)]
    saved = [saved for saved in saver.saved if saved.moment == "batch"][-2]
    _, part = recorded(callback(), ckpt_path=saved.path, **settings)
    assert part.rates == {place: rates for place, rates in record.rates.items() if place >= saved.batches}


class TwoGroups(TinyModule):
    """SGD, and two parameter groups that warm up differently, one of them from a rate of 0 for three steps."""

    def make_optimizer(self) -> Optimizer:
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.02}]
        return SGD(groups, lr=0.1, momentum=0.9)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        factors = [lambda s: 0.9**s * min(1.0, (s + 1) / 3), lambda s: 0.0 if s < 3 else 0.8**s]
        return [optimizer], [{"scheduler": lr_scheduler.LambdaLR(optimizer, factors), "interval": "step"}]


class TwoAdamGroups(TwoGroups):
    def make_optimizer(self) -> Optimizer:
        return Adam([{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.002}], lr=0.01)


class GroupRates(L.Callback):
    """The learning rate of each group at each optimizer step, by the number of batches made before."""

    def __init__(self) -> None:
        self.found: dict[int, list[float]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.found[trainer.fit_loop.total_batch_idx] = [group["lr"] for group in optimizer.param_groups]


def norm_drop_over_root_share(record: Record, place: int) -> float:
    """Of the pruning before the step at `place`, from the weights as trained and the masks around it."""
    weights, masks = record.ends[place - 1].module, record.starts[place].masks
    before = record.ends[place - 1].masks
    dropped = torch.cat([weights[name][before[name] & ~mask].double() for name, mask in masks.items()])
    everything = torch.cat([weights[name].double().flatten() for name in masks])
    share = len(dropped) / sum(int(mask.sum()) for mask in before.values())
    return float(dropped.norm() / everything.norm()) / share**0.5


@pytest.mark.parametrize(
    ("retrain", "make"),
    [(LinearLR(), TwoGroups), (AdaptiveLR(), TwoAdamGroups), (CyclicLR(), TwoAdamGroups), (ScaledLR(), TwoGroups)],
    ids=["linear", "adaptive", "cyclic", "scaled"],
)
def test_each_policy_sets_every_groups_rates_from_its_own_dense_ones_and_resumes_them(tmp_path, retrain, make):
    def callback() -> IterativeMagnitudePruning:
        return imp(length="2ep", dense_length="6ep", retrain=retrain)

    saver, whole = SaveEverywhere(tmp_path), GroupRates()
    _, record = recorded(callback(), whole, saver, make=make)
    for group in range(2):
        rates = [found[group] for found in whole.found.values()]
        dense, top = rates[:30], max(rates[:30])
        peak = dense.index(top)
        low = min(dense[peak:])
        assert peak > 0  # a warm-up
        for start in (30, 40):
            begin = top
            if isinstance(retrain, AdaptiveLR):
                drop = norm_drop_over_root_share(record, start)
                assert 10 / 30 < drop < 1  # between the limits
                begin = top * drop
            falling = {  # nine steps after one of warm-up
                LinearLR: [begin - begin * i / 9 for i in range(9)],
                AdaptiveLR: [begin - begin * i / 9 for i in range(9)],
                CyclicLR: [low + (top - low) * math.cos(math.pi * i / 18) ** 2 for i in range(9)],
                ScaledLR: [dense[max(i * 30 // 9, peak)] for i in range(9)],
            }[type(retrain)]
            assert rates[start : start + 10] == pytest.approx([0.0, *falling], rel=1e-9)
    for saved in saver.saved:
        if (saved.batches, saved.moment) in {(7, "batch"), (43, "batch")}:  # in the dense phase, in round 2
            part = GroupRates()
            recorded(callback(), part, make=make, ckpt_path=saved.path)
            assert part.found == {place: rates for place, rates in whole.found.items() if place >= saved.batches}


@pytest.mark.filterwarnings("ignore:.*is in no optimizer now")
def test_a_parameter_group_that_is_added_in_the_dense_phase_gets_rates_too():
    class Module(TinyModule):
        def configure_optimizers(self) -> Any:
            return SGD(self.body.parameters(), lr=0.1)

        def on_train_batch_end(self, *_: Any) -> None:
            optimizer = self.trainer.optimizers[0]
            if len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": self.head.parameters(), "lr": 0.02})

    rates = GroupRates()
    recorded(imp(rounds=1, length="2ep", retrain=LinearLR()), rates, make=Module)
    assert list(rates.found.values())[-9:] == [pytest.approx([0.1 * i / 9, 0.02 * i / 9]) for i in range(9, 0, -1)]


@pytest.mark.filterwarnings("ignore:.*is in no optimizer now")
def test_a_parameter_group_that_is_added_after_the_rewinding_place_keeps_its_rate_in_each_round():
    class Module(TinyModule):
        def configure_optimizers(self) -> Any:
            return SGD(self.body.parameters(), lr=0.1)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": self.head.parameters(), "lr": 0.02})

    rates = GroupRates()
    recorded(imp(rounds=1, length="2ep"), rates, make=Module)
    assert list(rates.found.values())[-9:] == [pytest.approx([0.1, 0.02])] * 9


@pytest.mark.parametrize("rewind_to", ["0ep", "1ep"])
def test_parameter_groups_keep_their_own_rates(rewind_to):
    class Module(TinyModule):
        def make_optimizer(self) -> Optimizer:
            groups = [{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.02}]
            return SGD(groups, lr=0.1, momentum=0.9)

        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer()
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5)]

    for retrain in (ReplayLR(), LastLR()):
        run = fit(imp(rounds=1, length="2ep", rewind_to=rewind_to, retrain=retrain), make=Module, max_epochs=-1)
        both = [rates[-2:] for rates in run.trace.batches.values()]
        assert [head / body for body, head in both] == pytest.approx([0.2] * len(both))


@pytest.mark.parametrize("optimizer_state", ["keep", "reset", "snapshot"])
def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(optimizer_state):
    """A compiled or captured step reads it where it lies."""

    class Module(TinyModule):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.01)
            self.optimizer = Adam(self.parameters(), lr=self.rate)
            return [self.optimizer], [lr_scheduler.StepLR(self.optimizer, 1, 0.5)]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert self.optimizer.param_groups[0]["lr"] is self.rate
            self.rates = [*getattr(self, "rates", []), float(self.rate)]

    run = fit(imp(rounds=1, rewind_to="1ep", optimizer_state=optimizer_state), make=Module, max_epochs=-1)
    assert run.module.rates == pytest.approx([0.01] * 5 + [0.005] * 10)


class Moved(L.LightningModule):
    """Its bias moves by the learning rate at each step: what was used, whatever hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.biases: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.biases.append(self.layer.bias[0].item())
        return self.layer.bias.sum() + self.layer.weight.square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.0)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        self.biases.append(self.layer.bias[0].item())

    @property
    def used(self) -> list[float]:
        return [before - after for before, after in pairwise(self.biases)]

    def set_rate(self, rate: float) -> None:
        self.trainer.optimizers[0].param_groups[0]["lr"] = rate

    def by_epoch(self) -> float:
        return 0.1 * 0.5**self.current_epoch

    def by_step(self) -> float:
        return 0.1 * 0.9**self.global_step


class AtEpochStart(Moved):
    def on_train_epoch_start(self) -> None:
        self.set_rate(self.by_epoch())


class AtBatchStart(Moved):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.set_rate(self.by_step())


class InTrainingStep(Moved):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.set_rate(self.by_step())
        return super().training_step(batch, batch_idx)


class BeforeTheStep(Moved):
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.set_rate(self.by_step())


class WarmUpInOptimizerStep(Moved):
    """As in Lightning's documentation: over a scheduler's rate, in the first steps of the run."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.global_step < 4:
            self.set_rate(0.1 * (self.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)
        if self.global_step == 4:
            self.set_rate(0.1)


class LambdaOfTheModule(Moved):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [lr_scheduler.LambdaLR(optimizer, lambda _: 0.5**self.current_epoch)]


class EpochToTheScheduler(Moved):
    """A scheduler of timm, which is told the epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [timm_scheduler.StepLRScheduler(optimizer, decay_t=1, decay_rate=0.5)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        AtEpochStart,
        AtBatchStart,
        InTrainingStep,
        BeforeTheStep,
        WarmUpInOptimizerStep,
        LambdaOfTheModule,
        EpochToTheScheduler,
    ],
)
def test_rates_that_a_module_sets_by_itself_are_those_of_the_dense_phase_in_each_round(tmp_path, make):
    def trained(*callbacks: L.Callback, **settings: Any) -> list[float]:
        return fit(*callbacks, make=make, **settings).module.used

    whole = trained(max_epochs=3)
    assert len({round(rate, 9) for rate in whole}) >= 2
    saver = SaveEverywhere(tmp_path)
    rates = trained(imp(length="3ep", rewind_to="1ep"), saver, max_epochs=-1)
    assert rates == pytest.approx(whole + 2 * whole[EPOCH:], rel=1e-9)
    for saved in saver.saved:
        if (saved.batches, saved.moment) in {(7, "batch"), (31, "batch")}:  # in the dense phase, in round 2
            part = trained(imp(length="3ep", rewind_to="1ep"), ckpt_path=saved.path, max_epochs=-1)
            assert part == pytest.approx(rates[saved.batches :], rel=1e-9)
    shorter = trained(imp(length="2ep", dense_length="0it"), max_epochs=-1)
    assert shorter == pytest.approx(2 * whole[: 2 * EPOCH], rel=1e-9)
    policy = trained(imp(length="2ep", dense_length="3ep", retrain=LastLR()), max_epochs=-1)
    assert policy == pytest.approx(whole + 4 * EPOCH * [whole[-1]], rel=1e-9)


class SeveralSteps(Moved):
    """Three steps in each batch, each followed by the scheduler's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(3):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            self.lr_schedulers().step()


def test_several_steps_in_a_batch_have_their_own_rates_in_each_round():
    whole = fit(make=SeveralSteps, max_epochs=2).module.used
    assert len({round(rate, 9) for rate in whole}) == 3 * 2 * EPOCH
    rates = fit(imp(length="2ep"), make=SeveralSteps, max_epochs=-1).module.used
    assert rates == pytest.approx(3 * whole, rel=1e-9)


def test_a_run_that_is_resumed_within_an_accumulation_has_the_same_rates(tmp_path):
    saver, settings = SaveEverywhere(tmp_path), {"make": AtBatchStart, "accumulate_grad_batches": 2, "max_epochs": -1}
    rates = fit(imp(length="2ep"), saver, **settings).module.used
    amid = [saved for saved in saver.saved if saved.moment == "batch" and saved.batches % EPOCH in (1, 3)]
    assert len(amid) == 12
    for saved in amid:
        part = fit(imp(length="2ep"), ckpt_path=saved.path, **settings).module.used
        assert part[1:] == pytest.approx(rates[saved.batches + 1 :], rel=1e-9)


class NotingLBFGS(LBFGS):
    """Keeps the rates with which it steps: it reads them before it calls its closure."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.used: list[float] = []

    def step(self, closure: Any) -> Any:
        self.used.append(self.param_groups[0]["lr"])
        return super().step(closure)


class WithLBFGS(AtBatchStart):
    def configure_optimizers(self) -> Any:
        self.optimizer = NotingLBFGS(self.parameters(), lr=0.1, max_iter=2)
        return self.optimizer


@pytest.mark.parametrize("retrain", [ReplayLR(), LastLR()])
def test_an_optimizer_that_reads_its_rate_before_the_closure_has_those_of_the_policy(retrain):
    used = fit(imp(length="1ep", retrain=retrain), make=WithLBFGS, max_epochs=-1).module.optimizer.used
    dense = [0.1 * 0.9**step for step in range(EPOCH)]
    rounds = dense if isinstance(retrain, ReplayLR) else [dense[-1]] * EPOCH
    assert used == pytest.approx(dense + 2 * rounds)


class FewerGroups(Moved):
    """Its second epoch goes on with one group of two."""

    def configure_optimizers(self) -> Any:
        return SGD([{"params": [self.layer.bias]}, {"params": [self.layer.weight], "lr": 0.01}], lr=0.1)

    def on_train_epoch_start(self) -> None:
        groups = self.trainer.optimizers[0].param_groups
        if self.current_epoch == 1:
            groups[0]["params"] += groups.pop()["params"]
            groups[0]["lr"] = 0.05


def test_parameter_groups_may_become_fewer():
    used = fit(imp(length="2ep"), make=FewerGroups, max_epochs=-1).module.used
    assert used == pytest.approx(3 * (EPOCH * [0.1] + EPOCH * [0.05]), rel=1e-9)


class Successor(Moved):
    """Adam gives way to SGD in the second epoch."""

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=0.01, weight_decay=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers = [SGD(self.parameters(), lr=0.05)]


@pytest.mark.filterwarnings("ignore:.*trainer.optimizers")
def test_an_optimizer_that_took_anothers_place_keeps_settings_of_its_own():
    run = fit(imp(length="2ep"), make=Successor, max_epochs=-1)
    (group,) = run.trainer.optimizers[0].param_groups
    assert (group["weight_decay"], "betas" in group) == (0, False)
    assert run.module.used[-EPOCH:] == pytest.approx(EPOCH * [0.05], rel=1e-9)


def test_an_optimizer_without_a_rate_is_refused_where_a_policy_sets_rates():
    class Module(PlainModule):
        def configure_optimizers(self) -> Any:
            return Adafactor(self.parameters(), lr=None)

    fit(imp(length="1ep"), make=Module, max_epochs=-1)
    with pytest.raises(ValueError, match=r"LinearLR sets learning rates, and an optimizer of this module has none"):
        fit(imp(length="1ep", retrain=LinearLR()), make=Module, max_epochs=-1)


def test_rounds_in_steps_are_refused_where_a_batch_has_several():
    with pytest.raises(ValueError, match=r"has made 3 optimizer steps in 1 batches.* Give all lengths in epochs"):
        fit(imp(length="6it"), make=SeveralSteps, max_epochs=-1)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_an_optimizer_that_wraps_another_one_is_counted_and_reset():
    class Module(PlainModule):
        def configure_optimizers(self) -> Any:
            return Lookahead(SGD(self.parameters(), lr=0.1, momentum=0.9), k=2)

    class States(L.Callback):
        def __init__(self) -> None:
            self.found: list[int] = []

        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            self.found.append(len(trainer.optimizers[0].state_dict()["state"]))

    states = States()
    run = fit(imp(rounds=1, length="1ep", optimizer_state="reset"), states, make=Module, max_epochs=-1)
    assert run.callback.step == 2 * EPOCH
    assert states.found[0] == states.found[EPOCH] == 0
    assert states.found[EPOCH - 1] > 0
