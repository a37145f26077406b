import math
import pickle
from copy import deepcopy
from itertools import product
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import (
    STEPS,
    PlainModule,
    SaveEverywhere,
    SaveNowhere,
    assert_same,
    fit,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from sparsetrain import Selection
from sparsetrain.callbacks import GroupLasso, L1Penalty, LinearWeight, Penalty
from sparsetrain.steps import RunLength

WEIGHTS = ("body.0.weight", "body.5.weight", "head.weight")


def l1(module: nn.Module) -> Tensor:
    return sum(module.get_parameter(name).abs().sum() for name in WEIGHTS)


class Task(PlainModule):
    """The harness's task; what `training_step` returns is a tensor, a dict, or None at every third batch.

    Args:
        by_hand: the weight of the L1 norm that the module adds itself.
    """

    def __init__(self, returns: str = "tensor", by_hand: float = 0.0) -> None:
        super().__init__()
        self.returns, self.by_hand = returns, by_hand

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        if self.by_hand:
            loss = loss + self.by_hand * l1(self)
        if self.returns == "none" and batch_idx % 3 == 2:
            return None
        return {"loss": loss, "logits": logits, "tag": 5} if self.returns == "dict" else loss


class Restless(L.Callback):
    """Stands for another callback that replaces `training_step` while the module trains."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = vars(pl_module).get("training_step")
        step = pl_module.training_step
        pl_module.training_step = lambda batch, batch_idx: step(batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before is None:
            del pl_module.training_step
        else:
            pl_module.training_step = self.before


def assert_trained_alike(module: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for name, value in other.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), value, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


SETTINGS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},  # which does not divide the batches of an epoch
    "clipped": {"gradient_clip_val": 0.1},
    "scaled": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4096.0))]},
}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("returns", "settings"), [*product(["tensor"], SETTINGS), ("dict", "accumulated"), ("none", "plain")]
)
def test_training_with_a_penalty_is_training_a_module_that_adds_it_to_its_loss(returns, settings):
    def chosen() -> dict[str, Any]:
        return {key: value() if callable(value) else value for key, value in SETTINGS[settings].items()}

    run = fit(L1Penalty(0.01), make=lambda: Task(returns), **chosen())
    assert_trained_alike(run.module, fit(make=lambda: Task(returns, by_hand=0.01), **chosen()).module)
    dense = fit(make=lambda: Task(returns), **chosen()).module
    assert not torch.allclose(run.module.head.weight, dense.head.weight, rtol=1e-2)


def test_a_penalty_sees_the_module_the_batch_and_the_outputs_and_their_gradient():
    seen: list[tuple[Any, Any]] = []

    class Confidence(Penalty):
        def value(self, pl_module: L.LightningModule, batch: Any, outputs: Any) -> Tensor:
            seen.append((pl_module, batch))
            return outputs["logits"].square().mean() + 0 * outputs["loss"]

    class ByHand(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return outputs["loss"] + 0.5 * outputs["logits"].square().mean() + 0.01 * l1(self)

    ends: list[dict[str, Any]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
            ends.append(outputs)

    run = fit(L1Penalty(0.01), Look(), Confidence(0.5, name="confidence"), make=lambda: Task("dict"))
    assert_trained_alike(run.module, fit(make=lambda: ByHand("dict")).module)
    assert len(seen) == len(ends) == STEPS
    assert all(module is run.module and batch[1].shape == (8,) for module, batch in seen)
    assert all(outputs.keys() == {"loss", "logits", "tag"} for outputs in ends)


def test_each_term_is_logged_as_it_is_added_while_its_weight_grows():
    norms: dict[int, float] = {}
    logged: dict[int, dict[str, float]] = {}

    class Record(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            norms[trainer.global_step] = l1(pl_module).item()

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            logged[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    growing = L1Penalty(LinearWeight(0.02, begin="3it", end="2ep"), name="growing")
    fit(growing, L1Penalty(0.01, where=Selection(exclude=("body.*",))), Record(), make=Task)
    assert len(norms) == len(logged) == STEPS
    for step, norm in norms.items():
        weight = 0.0 if step < 3 else 0.02 if step >= 10 else 0.02 * (step - 3) / 7
        assert logged[step]["penalty/growing"] == pytest.approx(weight * norm, rel=1e-4)
        assert 0 < logged[step]["penalty/l1"] < 0.01 * norm


@pytest.mark.parametrize("ends", ["fit", "exception"])
@pytest.mark.parametrize("own", [False, True])
def test_the_previous_training_step_is_back_whatever_the_order_in_which_penalties_end(ends, own):
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if ends == "exception" and trainer.global_step == 4:
                raise RuntimeError("out of luck")

    module, clean = Task(), vars(fit(make=Task).module).keys()
    previous = module.training_step
    if own:
        module.training_step = previous
    others = [Restless()] if ends == "fit" else []
    callbacks = [L1Penalty(0.01), *others, GroupLasso(0.01), L1Penalty(0.01, name="again"), Breaks()]
    if ends == "fit":
        fit(*callbacks, make=lambda: module)
    else:
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(*callbacks, make=lambda: module)
    if own:
        assert vars(module)["training_step"] is previous
    assert ("training_step" in vars(module)) == own
    assert vars(module).keys() - clean == ({"training_step"} if own else set())
    state = deepcopy(module.state_dict())

    def fresh() -> Task:
        Task()
        module.load_state_dict(state)
        return module

    used = fit(*[penalty for penalty in callbacks if isinstance(penalty, L1Penalty)], make=fresh)
    weights = deepcopy(used.module.state_dict())
    assert_same(fit(L1Penalty(0.01), L1Penalty(0.01, name="again"), make=fresh).module.state_dict(), weights)


class OneArgument(Task):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        return super().training_step(batch, 0)


def test_a_training_step_without_a_batch_index_gets_none():
    run = fit(L1Penalty(0.01), make=OneArgument)
    assert_trained_alike(run.module, fit(make=lambda: Task(by_hand=0.01)).module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module_is_penalized_and_stays_compiled():
    torch.compiler.reset()
    compiled: list[Any] = []

    class Look(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            compiled.append(vars(pl_module)["training_step"])

    short: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0}
    run = fit(Look(), L1Penalty(0.01), make=lambda: torch.compile(OneArgument(), backend="aot_eager"), **short)
    assert vars(run.module._orig_mod)["training_step"] is compiled[0]
    assert_trained_alike(run.module._orig_mod, fit(make=lambda: Task(by_hand=0.01), **short).module)


def test_a_copy_made_during_the_fit_trains_without_the_penalty():
    copies: list[Task] = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                copies.extend([deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])

    fit(L1Penalty(10.0), Copy(), make=Task)
    batch = torch.ones(2, 1, 4, 4), torch.tensor([0, 1])
    for copy in copies:
        copy.eval()
        expected = nn.functional.cross_entropy(copy(batch[0]), batch[1])
        torch.testing.assert_close(copy.training_step(batch, 0), expected)


def test_a_resumed_run_goes_on_with_the_weight_that_it_had(tmp_path):
    def penalties() -> list[Penalty]:
        return [L1Penalty(LinearWeight(0.05, "2it", "12it")), GroupLasso(LinearWeight(0.02, end="0.9run"))]

    saver = SaveEverywhere(tmp_path)
    full = fit(*penalties(), saver)
    path = next(saved.path for saved in saver.saved if saved.batches == 7)
    checkpoint = torch.load(path, weights_only=True)
    assert all("Penalty" not in key and "Lasso" not in key for key in checkpoint["callbacks"])
    assert_same(full.outcome(), fit(*penalties(), SaveNowhere(), ckpt_path=path).outcome())


class Shapes(L.LightningModule):
    """Weights of every kind of axis order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 3), nn.Conv2d(3, 5, 2)
        self.up = nn.ConvTranspose2d(5, 2, 3)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)


def slow_group_lasso(module: Shapes, group: str) -> float:
    total = 0.0
    for name, output, given in (("linear", 0, 1), ("conv", 0, 1), ("up", 1, 0)):
        weight = module.get_parameter(f"{name}.weight")
        squares: dict[Any, list[float]] = {}
        for place in product(*map(range, weight.shape)):
            key = {
                "channel": place[output],
                "input_channel": place[given],
                "shape": (place[given], *place[2:]),
                "layer": 0,
            }[group]
            squares.setdefault(key, []).append(float(weight[place].detach()) ** 2)
        total += sum(math.sqrt(len(group)) * math.sqrt(sum(group)) for group in squares.values())
    return total


@pytest.mark.parametrize("group", ["channel", "input_channel", "shape", "layer"])
def test_group_lasso_is_its_formula_over_the_groups_of_each_layer(group):
    torch.manual_seed(0)
    module, trainer = Shapes(), SimpleNamespace(strategy=None)
    penalty = GroupLasso(1.0, group=group, where=Selection(exclude=("grouped.*",)))
    penalty.prepare(trainer, module)
    assert penalty.value(module, None, None).item() == pytest.approx(slow_group_lasso(module, group))
    everything = GroupLasso(1.0, group=group)
    if group in ("input_channel", "shape"):
        with pytest.raises(ValueError, match=rf"'grouped.weight' belongs to .* groups=2, where group='{group}' would"):
            everything.prepare(trainer, module)
    else:
        everything.prepare(trainer, module)


def test_groups_that_are_zero_have_a_gradient_of_zero():
    module, penalty = Shapes(), GroupLasso(1.0, where=Selection(include=("linear.weight",)))
    penalty.prepare(SimpleNamespace(strategy=None), module)
    with torch.no_grad():
        module.linear.weight[1] = 0.0
    penalty.value(module, None, None).backward()
    naive = module.linear.weight.square().sum(1).sqrt().sum()
    assert torch.autograd.grad(naive, module.linear.weight)[0].isnan().any()
    assert not module.linear.weight.grad[1].any()
    expected = nn.functional.normalize(module.linear.weight.detach()[[0, 2]]) * 2.0  # sqrt of 4 weights
    torch.testing.assert_close(module.linear.weight.grad[[0, 2]], expected)


@pytest.mark.parametrize("penalty", [L1Penalty(1.0), GroupLasso(1.0, group="layer")])
def test_sums_over_half_precision_weights_do_not_overflow(penalty):
    module = Shapes()
    module.linear = nn.Linear(300, 300)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    penalty.prepare(SimpleNamespace(strategy=None), module.half())
    expected = 90_000 + 5 * 12 + 10 * 9 + 12 * 3
    assert penalty.value(module, None, None).item() == pytest.approx(expected)


class Manual(Task):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Wrong(Penalty):
    def value(self, pl_module: L.LightningModule, batch: Any, outputs: Any) -> Tensor:
        return pl_module.head.bias


@pytest.mark.parametrize(
    ("penalties", "make", "message"),
    [
        (lambda: [L1Penalty(0.1)], Manual, r"Manual optimizes manually, .* Use automatic optimization, or add the"),
        (lambda: [L1Penalty(0.1), L1Penalty(0.2)], Task, r"Two penalties are called 'l1'\. Give one of them another"),
        (lambda: [Wrong(0.1, name="w")], Task, r"The penalty 'w' has shape \(3,\); it must be a scalar"),
        (lambda: [L1Penalty(0.1, where=Selection(include=("haed.*",)))], Task, r"'haed\.\*' matches no parameter"),
        (lambda: [L1Penalty(LinearWeight(0.1, 2, "3ep"))], Task, r"step 15, but the run has 15 .* legal end is '14it'"),
        (lambda: [L1Penalty(LinearWeight(0.1, 4, 3))], Task, r"ends at step 3, before it begins at 4"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_nothing(penalties, make, message):
    module = make()
    with pytest.raises(ValueError, match=message):
        fit(*penalties(), make=lambda: module)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Penalty(-0.1), r"The weight of a penalty is -0\.1; it must be a finite number, at least 0"),
        (lambda: L1Penalty(math.nan), r"The weight of a penalty is nan"),
        (lambda: LinearWeight(0.1, end="2epochs"), r"end: '2epochs' is no length"),
        (lambda: GroupLasso(0.1, group="row"), r"group='row' is unknown\. Choose one of 'channel', 'input_channel'"),
    ],
)
def test_wrong_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sums_over_sharded_weights_are_refused(kind):
    trainer = SimpleNamespace(strategy=kind.__new__(kind))
    with pytest.raises(ValueError, match=rf"L1Penalty cannot sum over weights that {kind.__name__} shards. Use"):
        L1Penalty(0.1).setup(trainer, Task(), "fit")


def test_a_weight_without_growth_is_whole_from_the_first_step_and_fast_dev_run_tries_it():
    assert LinearWeight(0.3).resolve(RunLength(5, 15)).at(0) == 0.3
    assert LinearWeight(0.3, 4, 4).at(3) == 0.0
    assert LinearWeight(0.3, 4, 4).at(4) == 0.3
    run = fit(L1Penalty(LinearWeight(0.3, "1ep", "2ep")), make=Task, fast_dev_run=1)
    assert float(run.trainer.callback_metrics["penalty/l1"]) > 0
