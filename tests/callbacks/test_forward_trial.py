from typing import Any

import lightning as L
import pytest
import torch
from callbacks.recording import Quiet
from conformance.harness import assert_same, fit, loaders, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsetrain import PolarizationGating, SparseModelSoup
from sparsetrain.callbacks import LinearWeight
from sparsetrain.callbacks.forward_trial import ForwardTrial


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """As if other tests had compiled nothing, after which nothing is compared."""
    monkeypatch.setattr(torch._dynamo.utils, "counters", {"stats": {"unique_graphs": 0}})


plain_loader = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


def soup() -> SparseModelSoup:
    return SparseModelSoup(1, "1ep", sparsity=0.5, ingredients=2)


def gating() -> PolarizationGating:
    return PolarizationGating(
        sparsity=0.3,
        polarization=LinearWeight(0.1, 0, 4),
        budget=10.0,
        begin=0,
        end=2,
        extract_at=8,
        gate_lr=0.5,
        input_shape=(1, 4, 4),
        hidden=4,
    )


def raw() -> dict[str, Any]:
    """Images from 0 to 255, and labels."""
    return loaders() | {"train_dataloaders": DataLoader([(x.float(), y) for x, y in zip(*samples(), strict=True)], 8)}


class InStep(Quiet):
    """Normalizes in its training step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step(((images - 128) / 64, labels), batch_idx)


class InForward(Quiet):
    """Normalizes in its `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 128) / 64)


class AroundForward(InForward):
    """Normalizes in its `forward`, and in a training step that does not call it."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = Quiet.forward(self, (images - 128) / 64)
        return nn.functional.cross_entropy(logits, labels)


class Mixed(InForward):
    """Mixes the images of a batch in its training step, and adds noise."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        mixed = 0.6 * images + 0.4 * images.flip(0) + 10 * torch.randn_like(images)
        return super().training_step((mixed, labels), batch_idx)


@plain_loader
@pytest.mark.parametrize("callback", [soup, gating])
def test_a_module_that_normalizes_in_its_training_step_is_told_so(callback):
    with pytest.warns(UserWarning, match=r"of InStep gets inputs of mean .* in `training_step`, but 1\d\d and .* Norm"):
        fit(callback(), make=InStep, data=raw(), exact=False)


@plain_loader
@pytest.mark.parametrize("module", [InForward, AroundForward, Mixed])
@pytest.mark.parametrize("callback", [soup, gating])
@pytest.mark.filterwarnings("ignore:.* of the gates are undecided")
def test_others_are_not(callback, module):
    run = fit(callback(), make=module, data=raw(), exact=False)
    assert not any(part._forward_pre_hooks for part in run.module.modules())


class Indexed(Quiet):
    """Takes batches of (indices, images, labels)."""

    losses = 0

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        self.losses += 1
        return super().training_step((batch[1], batch[2]), batch_idx)


@plain_loader
@pytest.mark.parametrize("callback", [soup, gating])
def test_a_batch_that_forward_cannot_take_is_refused_after_one_step(callback):
    data = [(i, x / 64 - 2, y) for i, (x, y) in enumerate(zip(*samples(), strict=True))]
    module = Indexed()
    with pytest.raises(ValueError, match=r"a tensor of torch\.int64 and shape \(8,\); its `forward` fails: .*Let the"):
        fit(callback(), make=lambda: module, data=loaders() | {"train_dataloaders": DataLoader(data, 8)}, exact=False)
    assert module.losses == 1
    assert not any(part._forward_pre_hooks for part in module.modules())


class Restless(Quiet):
    """Has a `forward` that draws from its own generator, counts, keeps tensors, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.zeros(3))
        self.own, self.length, self.total = torch.Generator().manual_seed(1), 0, torch.zeros(())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.temperature = 2.0
        return super().training_step(batch, batch_idx)

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        if self.length < 3:
            self.length, self.ramp = 3, torch.linspace(0, 1, 3)
        x -= 0.1
        return super().forward(x + torch.rand((), generator=self.own)) / self.temperature + self.ramp


class Twice(L.Callback):
    """Tries `forward` as a method does, and may add up what a batch is before and after."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trial = ForwardTrial.of(trainer, pl_module)
        self.hooked: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        images, random = batch[0].clone(), torch.get_rng_state()
        self.trial.begin_batch(batch)
        self.hooked.append(sum(len(part._forward_pre_hooks) for part in pl_module.modules()))
        assert torch.equal(images, batch[0])
        assert torch.equal(random, torch.get_rng_state())


def test_a_trial_leaves_no_trace():
    twice = Twice()
    tried, plain = (fit(*callbacks, make=Restless, exact=False) for callbacks in ([twice], []))
    assert twice.hooked == [0, 1] + [0] * 13
    assert_same(tried.trace.batches, plain.trace.batches)
    assert_same(dict(tried.module.state_dict()), dict(plain.module.state_dict()))
    for name in ("ramp", "total", "length"):
        assert_same(getattr(tried.module, name), getattr(plain.module, name))
    assert torch.equal(tried.module.own.get_state(), plain.module.own.get_state())


class Frozen(Quiet):
    """Has frozen batch norm, and a `forward` that is called with more than images."""

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        assert not self.body[1].training
        return nn.functional.cross_entropy(self(batch[0], 0.5), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(batch[0], 0.5).mean())

    def on_train_epoch_start(self) -> None:
        self.body[1].eval()


class Holding(Quiet):
    """Keeps an activation, so that it cannot be copied."""

    def forward(self, x: Tensor) -> Tensor:
        self.held = self.body(x)
        return self.head(torch.relu(self.held))


@pytest.mark.parametrize("module", [Frozen, Holding])
def test_a_forward_that_is_not_called_or_cannot_be_tried_is_not(module):
    assert fit(soup(), make=module, exact=False).trainer.global_step == 15


@pytest.mark.parametrize("kind", ["sparse", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_layer_whose_input_has_no_moments_is_not_compared(kind):
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to_dense() if x.is_sparse else torch.stack(x.unbind())) * self.scale

    class Strange(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.first = First()

        def forward(self, x: Tensor) -> Tensor:
            x = x.to_sparse() if kind == "sparse" else torch.nested.as_nested_tensor(list(x))
            return super().forward(self.first(x))

    assert fit(soup(), make=Strange, exact=False).trainer.global_step == 15


class Rebuilt(nn.Linear):
    """Is copied by making it anew, which draws."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rebuilt":
        other = type(self)(self.in_features, self.out_features)
        other.load_state_dict(self.state_dict())
        return other


class Kept(nn.Linear):
    """Is one for all copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return self


class Inner(L.LightningModule):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + self.trainer.world_size)


class Strange(Quiet):
    """Logs in `forward`, calls a closure, and has parts that are copied in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rebuilt, self.kept = Inner(), Rebuilt(3, 3), Kept(3, 3)
        self.run = lambda x: self.head(torch.relu(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        self.log("x/mean", x.mean(), on_step=True, on_epoch=True)
        return self.kept(self.rebuilt(self.run(self.inner(x))))


@pytest.mark.filterwarnings("ignore:You called `self.log.'x/mean'")
def test_a_trial_of_a_strange_module_changes_neither_it_nor_what_is_logged():
    twice, logged = Twice(), []
    runs = [fit(*callbacks, make=Strange, exact=False) for callbacks in ([twice], [])]
    for run in runs:
        logged.append({name: float(value) for name, value in run.trainer.logged_metrics.items()})
        assert not run.module.kept._forward_pre_hooks
    assert not any(twice.hooked)  # the closure has called the module, not its copy
    assert_same(dict(runs[0].module.state_dict()), dict(runs[1].module.state_dict()))
    assert logged[0] == logged[1]
    assert "x/mean_epoch" in logged[0]
