from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.recording import Quiet
from callbacks.test_polarization_gating import gating
from conformance.harness import (
    PlainModule,
    Run,
    SaveEverywhere,
    SaveNowhere,
    TinyModule,
    assert_same,
    fit,
    loaders,
    make_trainer,
)
from conformance.test_exact_resume import resumed_differences
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn

from sparsetrain import (
    BidirectionalWeightPruning,
    Channel,
    FixedMasks,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    Masks,
    Movement,
    OneShot,
    Pruning,
    Selection,
    Shrinking,
    export,
)
from sparsetrain.data import InMemoryLoader
from sparsetrain.export.architecture import Architecture
from sparsetrain.models import CifarResNet

HEAD = Selection(include=("head.weight",))  # reads 16 hidden units


def pruning(**choices: Any) -> GradualMagnitudePruning:
    settings = {"where": HEAD, "pattern": Channel(axis=1)} | choices
    return GradualMagnitudePruning(OneShot(0.5, at=2), pruning=Pruning(**settings), check="full")


def given() -> FixedMasks:
    """Masks that cut off the second channel of the convolution and the first hidden unit of TinyModule."""
    linear, head = torch.ones(16, 64, dtype=torch.bool), torch.ones(3, 16, dtype=torch.bool)
    linear[:, 16:32], head[:, 0] = False, False
    return FixedMasks({"body.5.weight": linear, "head.weight": head}, check="full")


def shrinking(at: int | str = 5) -> Shrinking:
    return Shrinking(at, input_shape=(1, 4, 4))


class Before(L.Callback):
    """Keeps a copy of the module and its optimizer's state as it was before it shrank, and the batches from then on."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.batches: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.at:  # the sparsity method has moved behind this, and the shrinking behind it
            self.module = deepcopy(pl_module)
            self.optimizer = deepcopy(trainer.optimizers[0].state_dict())
            self.live = dict(pl_module.named_parameters())
            self.grads = {name: p.grad.clone() for name, p in self.live.items()}
            self.masks = deepcopy(dict(next(c for c in trainer.callbacks if hasattr(c, "masks")).masks))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.cut_grads = {name: p.grad.clone() for name, p in pl_module.named_parameters()}
        if trainer.global_step >= self.at:
            self.batches.append(batch)


def kept_places(tensor: Tensor, name: str) -> Tensor:
    """What `given` leaves of a tensor of TinyModule, or of one like it."""
    channels, hidden = torch.tensor([0, 2, 3]), torch.arange(1, 16)
    if name.startswith(("body.0.", "body.1.")) and tensor.dim() > 0:
        return tensor[channels]
    if name.startswith("body.5."):
        tensor = tensor[hidden]
        return tensor.view(15, 4, 16)[:, channels].flatten(1) if name.endswith("weight") else tensor
    return tensor[:, hidden] if name == "head.weight" else tensor


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    ],
)
def test_the_fit_goes_on_as_that_of_the_masked_network_would(optimizer):
    before = Before(12)
    run = fit(given(), before, shrinking(12), make=partial(Quiet, optimizer))
    dense = before.module.train()
    trained = optimizer(dense.parameters())
    trained.load_state_dict(before.optimizer)
    assert len(before.batches) == 3
    for images, labels in before.batches:
        trained.zero_grad()
        nn.functional.cross_entropy(dense(images), labels).backward()
        for name, mask in before.masks.items():
            dense.get_parameter(name).grad[~mask] = 0
        trained.step()
        for name, mask in before.masks.items():
            dense.get_parameter(name).data[~mask] = 0
    expected = {name: kept_places(tensor, name) for name, tensor in dense.state_dict().items()}
    torch.testing.assert_close(dict(run.module.state_dict()), expected, rtol=0, atol=1e-6)
    parameters = dict(run.module.named_parameters())
    assert {name: id(p) for name, p in parameters.items()} == {name: id(p) for name, p in before.live.items()}
    for name, parameter in parameters.items():
        state = trained.state[dense.get_parameter(name)]
        whole = {key: kept_places(value, name) if value.dim() else value for key, value in state.items()}
        torch.testing.assert_close(run.trainer.optimizers[0].state[parameter], whole, rtol=0, atol=1e-6)
    assert_same(before.cut_grads, {name: kept_places(grad, name) for name, grad in before.grads.items()})
    assert run.trainer.callbacks[-1].removed == 2
    assert run.callback.masks.sparsity() == 0


# After so much is gone, what is left could not be gated again.
MUCH = {"extract_at": 3, "hidden": None, "sparsity": 0.85}


@pytest.mark.parametrize("make", [pruning, lambda: gating(**MUCH), given], ids=["channels", "gates", "given"])
@pytest.mark.filterwarnings("ignore:.* of the gates are undecided")
def test_a_run_resumes_bit_identically_from_before_at_and_after_the_step(tmp_path, make):
    def train(*callbacks: L.Callback, **settings: Any) -> Run:
        return fit(make(), shrinking(), *callbacks, **settings)

    saver = SaveEverywhere(tmp_path)
    full = train(saver)
    dense = TinyModule().state_dict()["head.weight"].shape
    saved = [one for one in saver.saved if one.batches in (4, 5, 6)]
    assert [one.moment for one in saved] == ["batch", "batch", "validation", "epoch", "batch"]
    shapes = [torch.load(one.path, weights_only=True)["state_dict"]["head.weight"].shape for one in saved]
    assert [shape == dense for shape in shapes] == [True, True, False, False, False]
    for one in saved:
        part = train(SaveNowhere(), ckpt_path=one.path)
        assert not list(resumed_differences(full, part, one))
        assert "on_load_checkpoint" not in vars(part.module)


def test_a_finished_run_resumes_to_its_end_and_its_checkpoint_is_tested_by_a_trainer_with_the_callback(tmp_path):
    run = fit(pruning(), shrinking())
    run.trainer.test(run.module, loaders()["val_dataloaders"], verbose=False)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit(pruning(), shrinking(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(run.outcome()["module"], resumed.outcome()["module"])
    assert_same(run.outcome()["callbacks"], resumed.outcome()["callbacks"])
    for one, other in zip(run.module.modules(), resumed.module.modules(), strict=True):
        assert Architecture.of(one) == Architecture.of(other)
    evaluator, fresh, data = make_trainer(pruning(), shrinking()), TinyModule(), loaders()["val_dataloaders"]
    (tested,) = evaluator.test(fresh, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested["test/loss"] == pytest.approx(run.trace.validations[15])
    assert "on_load_checkpoint" not in vars(fresh)


class Small(L.LightningModule):
    """A residual network in float64 that notes its losses, in training and evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CifarResNet(8, 10, width=4).double()
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0].double()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def losses(self) -> Tensor:
        copied, stream = deepcopy(self), torch.Generator().manual_seed(1)
        batch = torch.randn(8, 3, 8, 8, generator=stream), torch.arange(8)
        training = copied.train().training_step(batch, 0)
        return torch.stack([training, copied.eval().training_step(batch, 0)]).detach()


class Around(L.Callback):
    """Notes the losses before and after the module shrinks, and holds the graph of an older one."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.graph = pl_module(torch.zeros(2, 3, 8, 8).double())
            self.before = pl_module.losses()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.after = pl_module.losses()


def test_a_residual_network_has_the_same_loss_before_and_after_and_is_saved_as_it_is(tmp_path):
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=stream, dtype=torch.uint8)
    data = InMemoryLoader(images, torch.arange(20) % 10, batch_size=4, mean=[128.0] * 3, std=[64.0] * 3)
    method = GradualMagnitudePruning(OneShot(0.5, at=1), pruning=Pruning(pattern=Channel(axis=1)))
    around, shrink, module = Around(), Shrinking("0.6run"), Small()
    make_trainer(method, around, shrink, max_epochs=1).fit(module, data)
    assert shrink.removed > 0
    assert module.network.layer3[0].conv1.out_channels < 16
    torch.testing.assert_close(around.after, around.before, rtol=0, atol=1e-9)
    export.save_shrunk(tmp_path, module)
    loaded = export.load_shrunk(Small(), tmp_path)
    torch.testing.assert_close(loaded.losses(), module.losses(), rtol=0, atol=1e-9)
    export.save_shrunk(tmp_path / "network", module.network)
    loaded.network = export.load_shrunk(Small().network, tmp_path / "network")
    torch.testing.assert_close(loaded.losses(), module.losses(), rtol=0, atol=1e-9)


class Unlogged(Quiet):
    """What is logged takes seconds to compile."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def whole(module: Quiet) -> Any:
    return torch.compile(module, backend="aot_eager")


def body(module: Quiet) -> Any:
    """As those do who save the time of looking for changed modules."""
    unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    module.body.compile(backend="aot_eager", options=unguarded)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("compile_", [whole, body])
def test_a_compiled_module_shrinks_to_the_same_network(compile_):
    torch.compiler.reset()
    eager, compiled = Unlogged(), Unlogged()
    compiled.load_state_dict(eager.state_dict())
    for module in (eager, compile_(compiled)):
        make_trainer(given(), shrinking(2), max_steps=4, limit_val_batches=0).fit(module, **loaders())
    assert compiled.head.in_features == 15
    torch.testing.assert_close(dict(compiled.state_dict()), dict(eager.state_dict()))


@pytest.mark.filterwarnings("ignore:.* of the gates are undecided")
def test_the_static_network_of_gates_shrinks_to_what_export_makes_of_it():
    class Exported(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            method = trainer.callbacks[-2]
            if method.step == 9:
                self.small, self.units = export.shrink(pl_module, method.units, torch.zeros(1, 1, 4, 4)), method.units

    exported = Exported()
    run = fit(gating(), exported, shrinking(9), make=PlainModule, max_epochs=-1, max_steps=9)
    assert_same(dict(run.module.state_dict()), dict(exported.small.state_dict()))
    assert run.trainer.callbacks[-1].removed == len(exported.units) > 0
    assert run.callback.units == ()
    assert run.callback.extraction.closed == len(exported.units)


def test_a_module_shrinks_again_in_a_second_fit_and_is_still_one_of_the_first():
    module = Quiet()
    for parameters in (3 * 8 + 3, 3 * 4 + 3):
        make_trainer(pruning(), shrinking()).fit(module, **loaders())
        assert sum(p.numel() for p in module.head.parameters()) == parameters


def test_masks_and_their_statistics_follow_a_cut():
    module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = Masks(Pruning(criterion=Movement()))
    masks.bind(module)
    places = {"0.weight": {0: (0, 3)}, "2.weight": {1: (0, 3)}, "0.bias": {0: (0, 3)}}
    for name, mask in masks.items():
        masks.stats.observe_step(name, torch.ones(mask.shape), torch.arange(float(mask.numel())).view(mask.shape))
    new = {name: torch.rand(mask.shape) < 0.5 for name, mask in masks.items()}
    masks.replace(new, "They")
    masks.cut(places)
    assert torch.equal(masks["0.weight"], new["0.weight"][[0, 3]])
    assert torch.equal(masks["2.weight"], new["2.weight"][:, [0, 3]])
    assert masks.kept == {name: int(mask.sum()) for name, mask in masks.items()}
    assert masks.total == 16
    assert torch.equal(masks.stats.state_dict()["2.weight"]["movement"], torch.tensor([[0.0, -3.0], [-4.0, -7.0]]))
    assert [row.shape for row in masks.plan] == [(2, 6), (2,), (2, 2), (2,)]


def test_a_criterion_with_statistics_goes_on():
    run = fit(pruning(criterion=Movement()), shrinking())
    assert run.module.head.in_features == 8


def test_nothing_cut_off_is_warned_of_and_the_run_goes_on():
    whole = FixedMasks({"head.weight": torch.ones(3, 16, dtype=torch.bool)})
    with pytest.warns(UserWarning, match=r"did not shrink at step 5\. FixedMasks has cut off no unit\. Prune more"):
        run = fit(whole, shrinking())
    assert run.trainer.callbacks[-1].removed == 0
    assert_same(run.outcome()["module"], fit(deepcopy(whole)).outcome()["module"])


class Auxiliary(Quiet):
    """Has a head for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.body(images))
        return self.head(hidden) + self.aux(hidden) if self.training else self.head(hidden)


def test_a_network_with_a_head_for_training_only_is_left_whole_and_trained_on():
    with pytest.warns(UserWarning, match=r"did not shrink at step 5\. Without the units, layer 'aux' of Auxiliary"):
        run = fit(pruning(), shrinking(), make=Auxiliary)
    assert run.trainer.callbacks[-1].removed == 0
    assert run.trainer.global_step == 15


class Casting(Quiet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.float())


@pytest.mark.parametrize("make", [pruning, gating], ids=["channels", "gates"])
def test_a_module_that_cannot_run_in_float64_is_refused_before_a_step(make):
    with pytest.raises(ValueError, match=r"Casting cannot run in float64 on an input of shape \(1, 1, 4, 4\)"):
        fit(make(), shrinking(9), make=Casting)


class Biasless(Quiet):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3, bias=False)
        nn.init.ones_(self.body[5].bias)


def test_a_constant_that_needs_a_new_bias_is_warned_of_and_the_run_goes_on():
    mask = torch.ones(16, 64, dtype=torch.bool)
    mask[0] = False  # only the bias is left of what the first unit is made of
    with pytest.warns(UserWarning, match=r"did not shrink at step 1\. 'head' reads a constant .* Channel\(axis=1\)"):
        run = fit(FixedMasks({"body.5.weight": mask}), shrinking(1), make=Biasless)
    assert run.module.head.in_features == 16


def test_a_constant_moves_into_the_bias_that_is_there():
    class Biased(Quiet):
        def __init__(self) -> None:
            super().__init__()
            nn.init.ones_(self.body[5].bias)

    class Last(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.module = deepcopy(pl_module)  # before it shrinks at the last step

    mask, last, images = torch.ones(16, 64, dtype=torch.bool), Last(), torch.randn(8, 1, 4, 4)
    mask[0] = False
    run = fit(FixedMasks({"body.5.weight": mask}), last, shrinking("1run"), make=Biased)
    assert run.module.head.in_features == 15
    torch.testing.assert_close(run.module.eval()(images), last.module.eval()(images))


def test_a_run_that_ends_before_the_step_says_so():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    with pytest.warns(UserWarning, match=r"ended at step 3, before its network was to shrink \(step 5\)"):
        fit(pruning(), shrinking(), Stop())


def test_a_trial_run_shrinks_at_its_end():
    run = fit(pruning(), shrinking(), fast_dev_run=2)
    assert run.module.head.in_features == 8


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], r"needs one sparsity method .* there are 0\. Add one, such as GradualMagnitudePruning"),
        (
            [pruning(pattern=Channel())],
            r"GradualMagnitudePruning with Channel\(axis=0\) cuts no channels off .*axis=1",
        ),
        ([BidirectionalWeightPruning()], r"BidirectionalWeightPruning with .* cuts no channels off"),
        (
            [IterativeMagnitudePruning(1, 5, sparsity=0.5, pruning=Pruning(pattern=Channel(axis=1)))],
            r"IterativeMagnitudePruning goes back to weights of the dense shapes .* Call export\.shrink after it",
        ),
        ([gating(granularity="layer")], r"granularity='layer'\) removes whole blocks .* Use granularity='channel'"),
        ([pruning(), EMAWeightAveraging()], r"EMAWeightAveraging does not go with Shrinking.*Remove it"),
        ([pruning(), StochasticWeightAveraging(0.1)], r"StochasticWeightAveraging does not go with Shrinking"),
    ],
)
def test_what_does_not_go_with_shrinking_is_refused_at_setup(others, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(shrinking(), *others).fit(TinyModule(), **loaders())


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy])
def test_several_devices_are_refused(kind):
    trainer = SimpleNamespace(callbacks=[pruning()], strategy=kind.__new__(kind))
    with pytest.raises(ValueError, match=rf"which {kind.__name__} cannot follow\. Use a single device"):
        shrinking().setup(trainer, TinyModule(), "fit")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (2, r"at=2 is step 2; it must be at least 3, when GradualMagnitudePruning has made its last masks, and at"),
        (16, r"at=16 is step 16; it must be at least 3, .* at most 15, as many as the run has"),
    ],
)
def test_a_step_outside_of_what_is_possible_is_refused_before_the_first(at, message):
    with pytest.raises(ValueError, match=message):
        fit(pruning(), shrinking(at))


def test_no_length_and_no_example_are_refused():
    with pytest.raises(ValueError, match=r"at: 'never' is no length"):
        shrinking("never")
    with pytest.raises(ValueError, match=r"Shrinking has no example to trace TinyModule with\. Give input_shape"):
        fit(pruning(), Shrinking(5))


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_whose_state_is_not_one_number_a_weight_is_refused_after_its_first_step(optimizer):
    with pytest.raises(ValueError, match=rf"{optimizer.__name__} holds '.*' for 'body.0.* Use another optimizer"):
        fit(pruning(), shrinking(), make=partial(Quiet, optimizer))


class Wider(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.body[5], self.head = nn.Linear(64, 20), nn.Linear(20, 3)


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    run = fit(pruning(), shrinking())
    run.trainer.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(ValueError, match=r"'body\.5\.weight' was \(16, 64\) there and is \(20, 64\) in this Wider"):
        fit(pruning(), shrinking(), make=Wider, ckpt_path=tmp_path / "small.ckpt")
    dense = fit(pruning(), shrinking(15), SaveEverywhere(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"has already shrunk, .* Give it as it was before"):
        fit(pruning(), shrinking(15), make=lambda: run.module, ckpt_path=tmp_path / "dense" / "000-001-batch.ckpt")
    assert dense.module.head.in_features == 8


def test_checkpoints_of_weights_alone_are_refused_as_nothing_could_load_them(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match=r"save_weights_only=True\) does not say what Shrinking has left"):
        fit(gating(), shrinking(), saver, make=PlainModule)
