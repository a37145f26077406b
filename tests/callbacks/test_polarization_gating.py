import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import timm
import torch
from callbacks.recording import Quiet
from conformance.harness import PlainModule, Run, SaveEverywhere, SaveNowhere, TinyModule, Watch, fit, loaders, samples
from conformance.test_exact_resume import resumed_differences
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sparsetrain import PolarizationGating, Selection, export
from sparsetrain.callbacks import LinearWeight, gate_training, recalibration
from sparsetrain.callbacks.gate_training import GateTraining
from sparsetrain.callbacks.gated import GatedLayer, close_, closed_units, gated_blocks, gated_layers, masked, operations
from sparsetrain.callbacks.polarization import Extraction
from sparsetrain.data import InMemoryLoader
from sparsetrain.gates import make_gates
from sparsetrain.models import CifarResNet
from sparsetrain.polarization import expected_cost
from sparsetrain.report.measure import cost

HIDDEN = Selection(include=("body.5.weight",))  # 16 units; the convolution's 4 channels are gated by default, too
undecided = pytest.mark.filterwarnings("ignore:.* of the gates are undecided")


def gating(kind: type[PolarizationGating] = PolarizationGating, **settings: Any) -> PolarizationGating:
    weights = {"polarization": LinearWeight(1.0, 0, 4), "budget": 10.0, "begin": 0, "end": 2}
    choices: dict[str, Any] = {"sparsity": 0.3, "extract_at": 8, "gate_lr": 0.5, "input_shape": (1, 4, 4), "hidden": 4}
    return kind(**(weights | choices | settings))


def one_batch(copies: int = 1) -> dict[str, Any]:
    images, labels = (torch.cat([part[:8]] * copies) for part in samples())
    train = InMemoryLoader(images, labels, batch_size=8, mean=[128.0], std=[64.0])
    return {**loaders(), "train_dataloaders": train}


class Look(L.Callback):
    """Keeps what the gating saves and logs after so many steps.

    Attributes:
        gates: its state of the gates.
        logged: metrics by name.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        callback = next(c for c in trainer.callbacks if isinstance(c, PolarizationGating))
        if callback.step == self.steps:
            self.gates = deepcopy(callback.state_dict()["gates"])
            self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_gates_and_loss_are_those_of_the_formulas():
    look = Look(3)
    fit(gating(hidden=None, where=HIDDEN), look, make=Quiet, data=one_batch(), max_epochs=10, limit_val_batches=0)
    torch.manual_seed(3)
    module, logits = Quiet(), torch.full((16,), 2.0)
    optimizer, mean, square = module.make_optimizer(), torch.zeros(16), torch.zeros(16)
    images, labels = next(iter(one_batch()["train_dataloaders"]))
    conv, gated = 2 * 36 * 16, 2 * 64 * 16 + 2 * 16 * 3
    for step in range(3):
        free = logits.clone().requires_grad_()
        soft = torch.sigmoid(free)
        gates = (free >= 0).float() + soft - soft.detach()
        task = nn.functional.cross_entropy(module.head(torch.relu(module.body(images)) * gates), labels)
        polarization = min(step / 4, 1.0) * (gates * (1 - gates)).mean()
        budget = 10 * ((conv + gated * gates.mean()) / (conv + gated) - (1 - 0.3 * min(step / 2, 1.0))) ** 2
        optimizer.zero_grad()
        (task + polarization + budget).backward()
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * free.grad, 0.999 * square + 0.001 * free.grad**2
        logits -= 0.5 * mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(look.gates["parameters"]["body.5.free"], logits)
    assert look.logged["penalty/budget"] == pytest.approx(float(budget.detach()))
    assert look.logged["penalty/polarization"] == pytest.approx(float(polarization.detach()), abs=1e-6)
    assert look.logged["gates/open"] == pytest.approx(float(gates.detach().mean()))


def moments(copies: int = 1, **settings: Any) -> Tensor:
    """What Adam has gathered of the gates' gradients in two steps, on the same batch `copies` times an epoch."""
    look = Look(2)
    callback = gating(hidden=None, where=HIDDEN)
    fit(callback, look, make=Quiet, data=one_batch(copies), limit_val_batches=0, max_epochs=10, **settings)
    moment: Tensor = look.gates["optimizer"]["state"][0]["exp_avg"]
    return moment


def test_gradients_of_gates_are_neither_scaled_nor_counted_for_each_accumulated_batch():
    # Adam's steps are the same under any factor, so its moments are compared.
    plain = moments()
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(moments(2, accumulate_grad_batches=2), plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled = moments(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    torch.testing.assert_close(scaled, plain, rtol=0.05, atol=1e-4)


class Small(nn.Module):
    """Two convolutions and two linear layers; the second convolution is read flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 6),
            nn.ReLU(),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def closed_at_random(
    model: nn.Module, example: Tensor
) -> tuple[tuple[GatedLayer, ...], dict[str, Tensor], dict[str, Tensor]]:
    """The gated layers, which of their channels are open, and masks of what reads them."""
    layers = gated_layers(model, export.units(model, example), Selection())
    stream = torch.Generator().manual_seed(4)
    opened = {x.name: torch.rand(len(x.units), generator=stream) < 0.6 for x in layers}
    for mask in opened.values():
        mask[0] = True
    masks = {f"{x.reader}.weight": torch.ones_like(model.get_submodule(x.reader).weight) != 0 for x in layers}
    close_(layers, opened, masks)
    return layers, opened, masks


def test_weights_that_no_layer_multiplies_are_passed_over():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).train()
    layers = gated_layers(model, export.units(model, torch.zeros(1, 3, 8)), Selection())
    assert [layer.name for layer in layers] == ["0.linear1"]


@pytest.mark.parametrize("measure", ["flops", "params"])
@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [(Small, (1, 4, 4), 3), (lambda: CifarResNet(8, 3, width=4), (3, 8, 8), 3)],
    ids=["plain", "residual"],
)
def test_the_cost_of_closed_gates_is_that_of_the_network_without_their_channels(make, shape, count, measure):
    torch.manual_seed(0)
    model, example = make().eval(), torch.randn(2, *shape)
    layers, opened, masks = closed_at_random(model, example)
    assert len(layers) == count
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).masked_fill_(~mask, 0)
    closed = [unit for x in layers for unit, kept in zip(x.units, opened[x.name], strict=True) if not kept]
    small = export.shrink(model, closed, example)

    gates = {name: mask.double() for name, mask in opened.items()}
    whole = operations(model, layers, example, measure)
    assert float(expected_cost(gates, whole)) == pytest.approx(count_of(small, example, measure))
    assert sum(operation.cost for operation in whole) == pytest.approx(count_of(model, example, measure))
    assert count_of(small, example, measure) < 0.9 * count_of(model, example, measure)


def count_of(network: nn.Module, example: Tensor, measure: str) -> int:
    if measure == "flops":
        return sum(cost(network, example).values())
    return sum(parameter.numel() for parameter in network.parameters())


def test_channels_that_a_linear_layer_reads_flattened_are_gated_as_a_whole():
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(5, 1, 4, 4)
    gates = make_gates(model.net[3].out_channels, name="3", axis=-3, features=1, hidden=None)
    gates.attach_channels(model.net[3], model.net[6], size=model.net[6].in_features // gates.count)
    with torch.no_grad():
        gates.free[1] = -1.0
        gated = model(x)
        gates.detach()
        channels = model.net[:5](x)
        channels[:, 1] = 0
        torch.testing.assert_close(gated, model.net[5:](channels))


def small_vit() -> nn.Module:
    settings = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings)


@pytest.mark.parametrize("measure", ["flops", "params"])
@pytest.mark.parametrize(
    ("make", "shape", "closed", "features"),
    [
        (lambda: CifarResNet(20, 3, width=4), (3, 8, 8), ("layer1.1", "layer3.2"), {(4, -3), (8, -3), (16, -3)}),
        (small_vit, (3, 16, 16), ("blocks.0", "blocks.2"), {(12, -1)}),
    ],
    ids=["residual", "transformer"],
)
def test_the_cost_of_closed_blocks_is_that_of_the_network_without_them(make, shape, closed, features, measure):
    torch.manual_seed(0)
    model, example = make().eval(), torch.randn(2, *shape)
    blocks = gated_blocks(model, example, Selection())
    assert {(block.features, block.axis) for block in blocks} == features
    opened = {block.name: torch.tensor([block.name not in closed]) for block in blocks}
    masks = {name: torch.ones_like(model.get_parameter(name)) != 0 for name in masked(model, blocks)}
    assert closed_units(blocks, masks) == ()
    close_(blocks, opened, masks)
    assert {name for name, mask in masks.items() if not mask.any()} == {
        name for name in masks if name.startswith(tuple(f"{block}." for block in closed))
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).masked_fill_(~mask, 0)
    units = closed_units(blocks, masks)
    assert tuple(unit.name for unit in units) == closed
    assert units == export.pruned_units(export.blocks(model, example), masks)
    small = export.shrink(model, units, example)
    gates = {name: mask.double() for name, mask in opened.items()}
    whole = operations(model, blocks, example, measure)
    assert float(expected_cost(gates, whole)) == pytest.approx(count_of(small, example, measure))
    assert sum(operation.cost for operation in whole) == pytest.approx(count_of(model, example, measure))


@undecided
def test_the_module_that_is_left_is_plain_and_shrinks_to_the_cost_that_was_found():
    run = fit(gating(), make=PlainModule)
    callback, module, x = run.callback, run.module.eval(), torch.randn(3, 1, 4, 4)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert {name.partition("[")[0] for name in (unit.name for unit in callback.units)} == {"body.0", "body.5"}
    assert len(callback.units) == callback.extraction.closed
    small = export.shrink(module, callback.units, x)
    torch.testing.assert_close(small(x), module(x))
    share = sum(cost(small, x).values()) / sum(cost(module, x).values())
    assert share == pytest.approx(callback.extraction.cost)
    assert share <= 0.7


def test_the_static_network_computes_what_the_gated_one_did_where_all_gates_agree():
    class Decided(PolarizationGating):
        """Its gates have the budget's number of channels closed when the network is extracted."""

        def _extract(self, training: GateTraining) -> None:
            with torch.no_grad():
                for name, parameter in training._parameters():
                    assert name == "body.5.free"
                    parameter.copy_(torch.tensor([-1.0, 1.0] * 8))
            self.outputs = []
            for extract in (lambda: None, lambda: super(Decided, self)._extract(training)):
                extract()
                training.pl_module.eval()
                self.outputs.append(training.pl_module(samples()[0] / 64 - 2).detach())
                training.pl_module.train()

    class WithoutNorm(PlainModule):
        """Batch norm's statistics are made anew at the extraction."""

        def __init__(self) -> None:
            super().__init__()
            self.body[1] = nn.Identity()

    callback = fit(gating(Decided, hidden=None, where=HIDDEN), make=WithoutNorm).callback
    before, after = callback.outputs
    torch.testing.assert_close(before, after)
    assert [unit.name for unit in callback.units] == [f"body.5[{number}]" for number in range(0, 16, 2)]
    assert callback.extraction == Extraction(8, callback.extraction.cost, 16, 8, 0.0, 0)


class Branch(nn.Module):
    """relu(x + f(x)), f of two convolutions with or without batch norm."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv2(torch.relu(self.conv1(x)))))


class ResidualModule(TinyModule):
    """`TinyModule` with two blocks; each takes 9216 FLOPs, and all else 3296."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        first, scale, *rest = self.body
        blocks = (Branch(4, norm=norm) for _ in BLOCKS)
        self.body = nn.Sequential(first, scale if norm else nn.Identity(), rest[0], *blocks, *rest[1:])


BLOCKS = ("body.3", "body.4")


def block_gating(**settings: Any) -> PolarizationGating:
    return gating(**({"granularity": "layer", "hidden": None, "check": "full"} | settings))


def test_closed_blocks_are_zero_from_the_extraction_on_and_leave_a_network_of_the_cost_that_was_found(tmp_path):
    watch, saver = Watch(), SaveEverywhere(tmp_path)
    run = fit(block_gating(), watch, saver, make=ResidualModule)
    callback, module, x = run.callback, run.module.eval(), samples()[0] / 64 - 2
    assert watch.seen.keys() >= {"step", "batch end", "validation", "checkpoint", "end"}
    tensors = [f"{part}.weight" for part in ("conv1", "conv2", "norm")] + ["norm.bias"]
    assert list(callback.masks) == [f"{block}.{tensor}" for block in BLOCKS for tensor in tensors]
    (unit,) = callback.units
    assert unit.is_block
    assert not any(module.get_parameter(f"{unit.name}.{tensor}").any() for tensor in tensors)
    small = export.shrink(module, callback.units, x)
    assert type(small.get_submodule(unit.name)) is nn.Identity
    torch.testing.assert_close(small(x), module(x))
    assert callback.extraction.cost == pytest.approx(12512 / 21728)  # the nearest to 0.7 that is at most this
    assert sum(cost(small, x).values()) == 12512
    for saved in saver.saved[-2:]:
        plain = ResidualModule().eval()
        plain.load_state_dict(torch.load(saved.path, weights_only=True)["state_dict"])
        assert torch.equal(plain(x), module(x))


def test_blocks_are_chosen_by_the_weights_in_them_and_a_budget_may_close_all():
    where = Selection(include=("body.4.conv1.weight", "head.weight"))
    run = fit(block_gating(where=where, sparsity=0.2), make=ResidualModule)
    assert [unit.name for unit in run.callback.units] == ["body.4"]
    assert run.callback.extraction.gates == 1
    run = fit(block_gating(sparsity=0.8), make=ResidualModule)
    assert [unit.name for unit in run.callback.units] == list(BLOCKS)


def test_the_static_network_computes_what_the_gated_one_did_where_blocks_are_closed():
    class Decided(PolarizationGating):
        """Its first block is closed when the network is extracted, its second open."""

        def _extract(self, training: GateTraining) -> None:
            with torch.no_grad():
                for (_, parameter), logit in zip(training._parameters(), (-1.0, 1.0), strict=True):
                    parameter.fill_(logit)
            self.outputs = []
            for extract in (lambda: None, lambda: super(Decided, self)._extract(training)):
                training.pl_module.eval()
                extract()
                self.outputs.append(training.pl_module(samples()[0] / 64 - 2).detach())
                training.pl_module.train()

    # Batch norm's statistics are made anew at the extraction.
    callback = fit(gating(Decided, granularity="layer", hidden=None), make=lambda: ResidualModule(norm=False)).callback
    before, after = callback.outputs
    torch.testing.assert_close(before, after)
    assert [unit.name for unit in callback.units] == ["body.3"]
    assert callback.extraction == Extraction(8, callback.extraction.cost, 2, 1, 0.0, 0)


@undecided
def test_block_gates_that_look_at_the_input_resume_bit_identically_before_and_after_the_extraction(tmp_path):
    def train(*callbacks: L.Callback, **settings: Any) -> Run:
        return fit(block_gating(extract_at=5, hidden=4), *callbacks, make=ResidualModule, **settings)

    saver = SaveEverywhere(tmp_path)
    full = train(saver)
    for saved in (saver.saved[2], saver.saved[6]):
        assert not list(resumed_differences(full, train(SaveNowhere(), ckpt_path=saved.path), saved))


@undecided
@pytest.mark.parametrize("accumulated", [1, 2])
def test_gates_that_look_at_the_input_resume_bit_identically_before_and_after_the_extraction(tmp_path, accumulated):
    def train(*callbacks: L.Callback, **settings: Any) -> Run:
        return fit(gating(extract_at=5), *callbacks, accumulate_grad_batches=accumulated, **settings)

    saver = SaveEverywhere(tmp_path)
    full = train(saver)
    assert full.callback.extraction is not None
    gated = torch.load(saver.saved[2].path, weights_only=True)["callbacks"][full.callback.state_key]["gates"]
    assert bool(gated["gradients"]) == (accumulated == 2)
    for saved in (saver.saved[2], saver.saved[6 * accumulated]):
        assert not list(resumed_differences(full, train(SaveNowhere(), ckpt_path=saved.path), saved))


@undecided
def test_gates_are_looked_at_without_augmentation_and_the_loader_goes_on_as_it_was():
    seen: list[int] = []

    def shift(images: Tensor, stream: torch.Generator) -> Tensor:
        seen.append(len(images))
        return images.roll(1, -1)

    images, labels = samples()
    train = InMemoryLoader(images, labels, batch_size=8, mean=[128.0], std=[64.0], shuffle=True, augment=[shift])
    fit(gating(), make=PlainModule, data={**loaders(), "train_dataloaders": train}, limit_val_batches=0)
    assert len(seen) == 15 + 1  # the batches of the run, and one that recalibrates batch norm
    assert train.augment == (shift,)


class Stream(IterableDataset):
    """The same images over and over, `ends` times; notes how many of each iteration were read."""

    def __init__(self, ends: float) -> None:
        self.ends, self.read = ends, []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = samples()
        iteration, place = len(self.read), 0
        self.read.append(0)
        while place < self.ends * len(images):
            self.read[iteration] = place + 1
            yield images[place % len(images)] / 64 - 2, labels[place % len(images)]
            place += 1


@undecided
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize(("ends", "read"), [(math.inf, 56), (1, 40)])
def test_of_a_loader_without_a_length_so_many_inputs_are_looked_at(monkeypatch, ends, read):
    for module in (gate_training, recalibration):
        monkeypatch.setattr(module, "MOST_IMAGES", 50)
    stream = Stream(ends)
    data = loaders() | {"train_dataloaders": DataLoader(stream, 8)}
    run = fit(gating(extract_at=4), make=PlainModule, data=data, exact=False, max_steps=5, max_epochs=-1)
    assert run.callback.extraction is not None
    assert run.trainer.global_step == 5
    assert stream.read[1:] == [read, read]  # by the gates, and by batch norm


class Named(Quiet):
    """Takes batches of {"images", "labels"}."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.losses = 0
        if not norm:
            self.body[1] = nn.Identity()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.losses += 1
        return nn.functional.cross_entropy(self(batch["images"]), batch["labels"])


def named() -> dict[str, Any]:
    images, labels = samples()
    data = [{"images": x / 64 - 2, "labels": y} for x, y in zip(images, labels, strict=True)]
    return loaders() | {"train_dataloaders": DataLoader(data, 8)}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize(("norm", "hidden"), [(True, 4), (False, 4), (True, None)])
def test_batches_that_the_extraction_cannot_use_are_refused_before_a_step(norm, hidden):
    module = Named(norm=norm)
    with pytest.raises(ValueError, match=r"is a dict that does not begin with a tensor of inputs, with which"):
        fit(gating(hidden=hidden), make=lambda: module, data=named(), exact=False)
    assert module.losses == 0
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_any_batches_will_do_where_the_extraction_needs_none():
    run = fit(gating(hidden=None), make=lambda: Named(norm=False), data=named(), exact=False)
    assert run.callback.extraction.step == 8


class Pairs(Quiet):
    """Takes batches of two loaders and trains on the first."""

    losses = 0

    def training_step(self, batch: list[tuple[Tensor, Tensor]], batch_idx: int) -> Tensor:
        self.losses += 1
        return super().training_step(batch[0], batch_idx)


@undecided
def test_several_loaders_are_looked_at_in_turn_and_with_batch_norm_refused_before_a_step():
    module, data = Pairs(), loaders()
    data["train_dataloaders"] = [data["train_dataloaders"], loaders()["train_dataloaders"]]
    with pytest.raises(ValueError, match=r"with the batches of one training loader; there are 2\. Give one"):
        fit(gating(), make=lambda: module, data=data, exact=False)
    assert module.losses == 0
    module.body[1] = nn.Identity()
    assert fit(gating(), make=lambda: module, data=data, exact=False).callback.extraction is not None


def test_the_extraction_leaves_random_streams_and_modes_alone():
    class Streams(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.draws = torch.get_rng_state(), all(part.training for part in pl_module.modules())

    dense, gated = Streams(), Streams()
    fit(dense)
    with pytest.warns(UserWarning, match=r"of the gates are undecided at step 8: .*`polarization` be larger"):
        fit(gated, gating(polarization=LinearWeight(0.0), gate_lr=0.1))
    assert torch.equal(dense.draws[0], gated.draws[0])
    assert dense.draws[1]
    assert gated.draws[1]


def test_a_run_that_ends_before_the_extraction_leaves_the_dense_network_and_says_so():
    with pytest.warns(UserWarning, match=r"ended at step 5, before its gates .* \(step 8\): .* the dense network"):
        run = fit(gating(), EarlyStopping("train/loss", divergence_threshold=0.0))
    assert not run.callback.units
    assert run.callback.masks.sparsity() == 0
    assert "training_step" not in vars(run.module)
    assert not any(part._forward_pre_hooks for part in run.module.modules())


class Manual(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Functional(PlainModule):
    """Does not call a layer that is gated as a module in training."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        hidden = self.body[:5](images)
        return self.head(torch.relu(nn.functional.linear(hidden, self.body[5].weight, self.body[5].bias)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "block"}, r"granularity='block' is unknown\. Choose one of 'channel', 'layer'"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 is the share of the cost to remove, which lies in \(0, 1\)"),
        ({"measure": "time"}, r"measure='time' is unknown\. Choose one of 'flops', 'params'"),
        ({"budget": -1.0}, r"budget=-1\.0 is the weight of a term of the loss, which is at least 0"),
        ({"gate_lr": 0.0}, r"gate_lr=0\.0 is a learning rate, which is above 0"),
        ({"hidden": 0}, r"hidden=0 must be at least 1, or None"),
        ({"extract_at": "never"}, r"extract_at: 'never' is no length"),
    ],
)
def test_settings_out_of_range_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        gating(**settings)


@pytest.mark.parametrize(
    ("settings", "make", "message"),
    [
        (
            {"extract_at": 16},
            TinyModule,
            r"extract_at=16 is step 16; it must be at least 1, and at most 15, as many as",
        ),
        ({"extract_at": 0}, TinyModule, r"extract_at=0 is step 0; it must be at least 1"),
        ({"end": 20}, TinyModule, r"reaches its final value at step 20, but the run has 15"),
        ({"input_shape": None}, TinyModule, r"has no example to trace TinyModule with\. Give input_shape, such as"),
        ({"input_shape": (1, 5, 5)}, TinyModule, r"cannot trace TinyModule on an input of shape \(1, 1, 5, 5\)"),
        ({"sparsity": 0.95}, TinyModule, r"sparsity=0\.95 cannot be met: .* 0\.0989 of the flops .* Ask for less"),
        (
            {"where": Selection(include=("head.weight",))},
            TinyModule,
            r"no layer that can be gated with .*'head': its channels cannot be removed\. Gated are",
        ),
        ({"where": Selection(include=("tail.weight",))}, TinyModule, r"'tail.weight' matches no parameter"),
        ({"granularity": "layer"}, TinyModule, r"no block that can be gated with .*'body': it makes a tensor of shape"),
        (
            {"granularity": "layer", "where": Selection(include=("head.weight",))},
            ResidualModule,
            r"ResidualModule has no block that can be gated with .*: no module holds",
        ),
        (
            {"granularity": "layer", "sparsity": 0.9},
            ResidualModule,
            r"sparsity=0\.9 cannot be met: .* 0\.1517 of the flops",
        ),
        (
            {"granularity": "layer", "input_shape": (1, 5, 5)},
            ResidualModule,
            r"cannot run in float64 on an input of shape",
        ),
        ({}, Manual, r"Manual optimizes manually"),
        ({}, Functional, r"reads the channels of 'body.5' has run without 'body.5' before it, or twice after it"),
    ],
)
def test_what_does_not_fit_the_module_or_the_run_is_refused_before_a_step(settings, make, message):
    with pytest.raises(ValueError, match=message):
        fit(gating(**settings), make=make)


def test_parameters_that_forward_does_not_run_are_no_part_of_the_cost():
    class Student(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(16, 1000), nn.Linear(1000, 3))
            self.spare = nn.Linear(16, 16)

    example = torch.zeros(1, 1, 4, 4)
    for make in (PlainModule, Student):
        model = make()
        layers = gated_layers(model, export.units(model, example), Selection())
        whole = sum(one.cost for one in operations(model, layers, example, "params"))
        assert whole == sum(parameter.numel() for parameter in PlainModule().parameters())
