from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from callbacks.recording import imp, recorded
from conformance.harness import PlainModule, SaveEverywhere, TinyModule, Trace, fit, loaders, make_trainer, samples
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from sparsetrain import (
    AdaptiveLR,
    Global,
    GradualMagnitudePruning,
    LastLR,
    Magnitude,
    OneShot,
    Pruning,
    Saliency,
)
from sparsetrain.data import InMemoryLoader


class Manual(TinyModule):
    """Steps its optimizer and its scheduler itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return loss


@pytest.mark.parametrize("rewind_to", ["0ep", "1ep"])
def test_manual_optimization_replays_the_rates_that_the_module_steps(rewind_to):
    run, record = recorded(imp(rewind_to=rewind_to), make=Manual)
    rates = list(record.rates.values())
    assert rates[10:] == 2 * rates[5 if rewind_to == "1ep" else 0 : 10]
    assert rates == list(recorded(imp(rewind_to=rewind_to))[1].rates.values())
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_manual_optimization_is_refused_where_the_callback_sets_the_rate():
    with pytest.raises(ValueError, match=r"LastLR sets the learning rate itself.*Use ReplayLR\(\), or automatic"):
        recorded(imp(retrain=LastLR()), make=Manual)


class ManualByDefault(Manual):
    """Its scheduler is not said to step at each step, as Lightning does not ask under manual optimization."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))]


@pytest.mark.parametrize(("length", "trained"), [("2ep", 10), (7, 7)])
def test_manual_optimization_may_step_its_scheduler_whenever_it_likes(length, trained):
    for choices in ({}, {"dense_length": "0it"}):
        _, record = recorded(imp(length=length, **choices), make=ManualByDefault)
        rates = list(record.rates.values())
        assert rates == rates[:trained] * (len(rates) // trained)
        assert len(set(rates)) == trained


def test_a_schedule_cannot_be_brought_forward_under_manual_optimization():
    message = r"stepped CosineAnnealingLR before step 5, at which .* Begin with a dense phase, with rewind_to='0it'"
    with pytest.raises(ValueError, match=message):
        recorded(imp(dense_length="0it", rewind_to="1ep"), make=ManualByDefault)


class Foreign:
    """A scheduler as timm has them: not of torch."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class WithForeign(TinyModule):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Foreign(optimizer), "interval": "epoch"}}

    def lr_scheduler_step(self, scheduler: Foreign, metric: Any) -> None:
        scheduler.step(self.current_epoch)


def test_a_scheduler_that_is_not_torchs_cannot_be_brought_to_where_rounds_begin():
    choices = {"length": "2ep", "rewind_to": "1ep"}
    recorded(imp(**choices), make=WithForeign)
    with pytest.raises(
        ValueError, match=r"Foreign is no scheduler of torch\.optim: .* before step 5, at which the rounds"
    ):
        recorded(imp(dense_length="0it", **choices), make=WithForeign)


@pytest.mark.parametrize("length", ["1ep", "5it"])
def test_a_changing_accumulation_is_refused(length):
    with pytest.raises(ValueError, match=r"how many optimizer steps an epoch has\. Use .* one accumulate_grad_batches"):
        fit(imp(length=length), GradientAccumulationScheduler({1: 2}), make=PlainModule, max_epochs=-1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_loader_without_a_length_is_refused():
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from loaders()["train_dataloaders"]

    trainer = make_trainer(imp(length="2it"), max_epochs=-1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"Use a loader with a length and one accumulate_grad_batches"):
        trainer.fit(PlainModule(), Endless())


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (
            imp(2, "2ep"),
            {"max_epochs": 5},
            r"dense phase of 2 and 2 rounds of 2 are 6 epochs; this Trainer has max_epo",
        ),
        (imp(2, "2ep"), {"max_epochs": 6, "max_steps": 30}, r"has max_epochs=6 and max_steps=30\. Use Trainer\(max_ep"),
        (
            imp(2, "2ep"),
            {"max_epochs": -1, "max_steps": 30},
            r"are 6 epochs; .*max_steps=30\. Use Trainer\(max_epochs=6",
        ),
        (
            imp(2, 7),
            {"max_epochs": -1, "max_steps": 20},
            r"rounds of 7 are 21 steps; .*Use Trainer\(max_steps=21\), or",
        ),
        (
            imp(2, 7),
            {"max_epochs": 5},
            r"are 21 steps; this Trainer has max_epochs=5 and max_steps=-1\. Use Trainer\(max",
        ),
        (
            imp(2, 7, rewind_to=2),
            {"max_epochs": 9, "max_steps": 17},
            r"dense phase of 7 and 2 rounds of 5 are 17 steps",
        ),
    ],
)
def test_a_trainer_of_another_length_or_unit_is_told_the_right_one(callback, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(callback, **settings)


class Growing(PlainModule):
    """Has more data from its second epoch on."""

    def train_dataloader(self) -> InMemoryLoader:
        images, labels = samples()
        count = 24 if self.current_epoch == 0 else 40
        return InMemoryLoader(images[:count], labels[:count], batch_size=8, mean=[128.0], std=[64.0])


@pytest.mark.parametrize(
    "other", [{"sparsity": 0.9}, {"weights": "rewind"}, {"optimizer_state": "reset"}, {"retrain": LastLR()}], ids=str
)
def test_a_run_is_not_resumed_with_other_rounds(tmp_path, other):
    saver = SaveEverywhere(tmp_path)
    fit(imp(2, "1ep"), saver, max_epochs=3, make=PlainModule)
    with pytest.raises(ValueError, match=r"The run was saved with \{'rounds': 2, .* with its own settings"):
        fit(imp(2, "1ep", **other), max_epochs=3, make=PlainModule, ckpt_path=saver.saved[8].path)


def test_epochs_of_two_lengths_are_refused():
    data = {"val_dataloaders": loaders()["val_dataloaders"]}
    with pytest.raises(ValueError, match=r"Epoch 1 has 5 optimizer steps, and the first one has had 3: rounds are"):
        fit(imp(2, "1ep"), max_epochs=3, make=Growing, data=data, reload_dataloaders_every_n_epochs=1)


def test_a_sparsity_that_floors_exclude_is_refused_before_the_first_step():
    pruning = Pruning(allocation=Global(floor_share=0.1))
    gradual = GradualMagnitudePruning(OneShot(0.95), pruning=pruning)
    for callback in (imp(2, "1ep", sparsity=0.95, pruning=pruning), gradual):
        trace = Trace()
        with pytest.raises(ValueError, match=r"keeps at least .* The largest sparsity that leaves them is"):
            fit(callback, trace, max_epochs=3)
        assert not trace.batches


def test_the_callback_says_how_long_the_trainer_has_to_be():
    assert imp(2, "40ep", rewind_to="4ep").length == "112ep"
    assert imp(3, 500, dense_length="2000it").length == "3500it"
    assert fit(imp(2, "1ep"), max_epochs=3).callback.total_steps == 15


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"rounds": 0}, r"rounds is 0; there must be at least 1"),
        ({"length": "0ep"}, r"round_length is 0; a round trains at least one step"),
        ({"length": "1.5ep"}, r"round_length='1\.5ep' must be whole epochs"),
        ({"length": "forty"}, r"round_length: 'forty' is no length"),
        ({"dense_length": "0.1run"}, r"dense_length='0\.1run' must be whole epochs"),
        ({"dense_length": 10}, r"round_length='2ep', dense_length=10 are in two units"),
        ({"rewind_to": "3it"}, r"round_length='2ep', dense_length='2ep', rewind_to='3it' are in two units"),
        ({"rewind_to": "2ep"}, r"rewind_to is 2, but a round is over after 2"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 is no sparsity"),
        ({"sparsity": 80}, r"sparsity=80 is no sparsity: .* Write 0\.8 for 80 %"),
        ({"sparsity": None}, r"sparsity=None and per_round=None: give exactly one"),
        ({"per_round": 1.0}, r"per_round=1\.0 is no sparsity"),
        ({"per_round": 0.2, "sparsity": 0.8}, r"sparsity=0\.8 and per_round=0\.2: give exactly one"),
        ({"weights": "restart"}, r"weights='restart' is unknown\. Choose one of 'keep', 'rewind'\."),
        (
            {"optimizer_state": "rewind"},
            r"optimizer_state='rewind' is unknown\. Choose one of 'keep', 'reset', 'snapshot'\.",
        ),
        ({"retrain": "LastLR"}, r"retrain='LastLR' is no policy\. Give one such as ReplayLR\(\) or LastLR\(\)\."),
        ({"retrain": LastLR}, r"is no policy\. Give one such as ReplayLR\(\) or LastLR\(\)\."),
        (
            {"weights": "rewind", "dense_length": "3ep"},
            r"weights='rewind' trains each round as the dense phase was trained, but dense_length is 3 and",
        ),
        (
            {"dense_length": "1ep"},
            r"ReplayLR\(\) runs the last 2 of the schedule's 1 again\. Make dense_length at least",
        ),
        (
            {"retrain": AdaptiveLR(), "dense_length": "0ep"},
            r"AdaptiveLR\(\) needs the learning rates of a dense phase, and dense_length=0 leaves none",
        ),
        (
            {"pruning": Pruning(criterion=Saliency())},
            r"Saliency needs gradients, and there are none between two rounds",
        ),
    ],
    ids=str,
)
def test_arguments_that_are_out_of_range_or_do_not_go_together_are_refused(choices, message):
    choices = {"rounds": 2, "length": "2ep"} | choices
    with pytest.raises(ValueError, match=message):
        imp(choices.pop("rounds"), choices.pop("length"), **choices)


@pytest.mark.parametrize(
    "choices",
    [
        {"dense_length": "1ep", "rewind_to": "1ep"},
        {"dense_length": "0it", "weights": "rewind"},
        {"dense_length": "1ep", "retrain": LastLR()},
        {"pruning": Pruning(criterion=Magnitude())},
    ],
    ids=str,
)
def test_arguments_at_their_limits_are_taken(choices):
    recorded(imp(**choices), make=PlainModule)
