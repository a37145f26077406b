"""Whole residual blocks are found by what they compute, and removed with the same outputs, or refused by name."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from test_shrink import Residual, exact, settled, some
from torch import nn

from sparsetrain.export import blocks, load_shrunk, pruned_units, save_shrunk, shrink, silence, units
from sparsetrain.models import GPT, resnet20
from sparsetrain.ops import NMRule, convert
from sparsetrain.report import cost


class Step(nn.Module):
    """x + f(x) with pre-activation, of plain modules; its last layer has no bias."""

    def __init__(self, width, hidden=12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(F.relu(self.norm(x)))))


class MLP(nn.Module):
    """A person's own residual network."""

    def __init__(self, depth=3, width=6):
        super().__init__()
        self.stem, self.out = nn.Linear(4, width), nn.Linear(width, 2)
        self.steps = nn.ModuleList(Step(width) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return self.out(x)


def mlp():
    torch.manual_seed(0)
    return MLP(), torch.randn(5, 4)


def vit():
    settings = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 3}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings).eval(), torch.randn(2, 3, 16, 16)


def resnet(shortcut="B"):
    torch.manual_seed(0)
    return settled(resnet20(shortcut=shortcut, width=4)), torch.randn(2, 3, 8, 8)


def gpt():
    torch.manual_seed(0)
    return GPT(20, 16, layers=2, width=16, heads=2).eval(), torch.randint(0, 20, (2, 12))


def closing(unit):
    return [piece.tensor.removeprefix(f"{unit.name}.") for piece in unit.slices]


BATCH_NORM = ["bn2.weight", "bn2.bias"]
BRANCHES = ["attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


@pytest.mark.parametrize(
    ("make", "names", "tensors"),
    [
        (resnet, ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"], BATCH_NORM),
        (vit, ["blocks.0", "blocks.1", "blocks.2"], BRANCHES),
        (gpt, ["blocks.0", "blocks.1"], BRANCHES),
        (mlp, ["steps.0", "steps.1", "steps.2"], ["fc2.weight"]),
    ],
)
def test_the_innermost_blocks_with_identity_shortcuts_are_found_with_what_closes_them(make, names, tensors):
    model, x = make()
    state = copy.deepcopy(model.state_dict())
    found = blocks(model, x)
    assert [unit.name for unit in found] == names
    assert all(unit.is_block and closing(unit) == tensors for unit in found)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_what_closes_a_block_does_not_depend_on_the_values_of_its_parameters():
    model, x = mlp()
    with torch.no_grad():
        for step in model.steps:
            step.fc1.weight.zero_()
            step.fc1.bias.zero_()  # so that the block returns its input now
    assert [closing(unit) for unit in blocks(model, x)] == [["fc2.weight"]] * 3


def test_the_parameters_that_close_a_block_may_be_its_own_and_may_be_one_number():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gain = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return x + self.gain * self.fc(x)

    model, x = nn.Sequential(Scaled(), nn.Linear(4, 2)), torch.randn(2, 4)
    (unit,) = blocks(model, x)
    assert closing(unit) == ["gain"]
    silence(model, [unit])
    assert torch.equal(shrink(model, [unit], x)(x), model[1](x))


def test_a_block_that_ends_in_a_relu_returns_only_what_is_not_negative():
    class Ends(nn.Sequential):
        def forward(self, x):
            return F.relu(x + super().forward(x))

    branch = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
    x = torch.zeros(2, 4)  # an example that shows no sign
    for first, names in ((nn.ReLU(), ["2"]), (nn.Identity(), [])):
        model = nn.Sequential(nn.Linear(4, 4), first, Ends(*branch), Step(4))
        assert [unit.name for unit in blocks(model, x)] == [*names, "3"]


def test_blocks_are_named_by_globs_or_in_full():
    model, x = resnet()
    assert [unit.name for unit in blocks(model, x, names=["layer2.*", "layer1.1"])] == [
        "layer1.1",
        "layer2.1",
        "layer2.2",
    ]
    (stage,) = blocks(model, x, names=["layer1"])
    assert stage.parameters == sum(p.numel() for p in model.layer1.parameters())
    assert closing(stage) == [f"{number}.{name}" for number in range(3) for name in BATCH_NORM]


# Removal.


@pytest.mark.parametrize("make", [resnet, vit, gpt, mlp])
def test_a_network_without_blocks_computes_what_the_silenced_one_does_and_costs_as_much_less(make):
    model, x = make()
    chosen = blocks(model, x)[1:]
    before = exact(model, x)
    silence(model, chosen)
    small = shrink(model, chosen, x)
    after = exact(model, x)
    assert (exact(small, x) - after).abs().max() <= 1e-9
    assert (before - after).abs().max() > 1e-5
    assert all(type(small.get_submodule(unit.name)) is nn.Identity for unit in chosen)
    assert sum(cost(small, x).values()) == sum(cost(model, x).values()) - sum(unit.flops for unit in chosen)
    left = [sum(parameter.numel() for parameter in network.parameters()) for network in (small, model)]
    assert left[0] == left[1] - sum(unit.parameters for unit in chosen)
    exported = torch.export.export(small.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


def test_blocks_and_channels_are_removed_together_also_channels_that_removed_blocks_share():
    model, x = resnet()
    closed = blocks(model, x)[1::2]
    channels = some(units(model, x))
    assert any(unit.name.startswith("layer1.1.") for unit in channels)  # inside of a removed block
    silence(model, [*closed, *channels])
    small = shrink(model, [*closed, *channels], x)
    assert (exact(small, x) - exact(model, x)).abs().max() <= 1e-9
    assert type(small.layer1[1]) is nn.Identity
    assert small.layer1[0].conv1.out_channels < 4


def test_networks_that_were_shrunk_again_and_again_are_rebuilt_from_their_base_model(tmp_path):
    def step(model, found):
        silence(model, found)
        return shrink(model, found, x)

    base, x = resnet()
    small = step(base, [*blocks(base, x, names=["layer2.1"]), *some(units(base, x))])
    assert small.layer1[1].conv1.out_channels < 4
    small = step(small, blocks(small, x, names=["layer1.1"]))  # with fewer channels
    small = step(small, blocks(small, x, names=["layer1"]))  # a block has gone from it already
    small = step(small, some(units(small, x)))
    save_shrunk(tmp_path / "small", small)
    loaded = load_shrunk(resnet()[0], tmp_path / "small")
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(x), small(x))
    save_shrunk(tmp_path / "again", loaded)
    assert (tmp_path / "again/architecture.json").read_text() == (tmp_path / "small/architecture.json").read_text()
    with pytest.raises(ValueError, match=r"'conv1.weight' is \(4, 3, 3, 3\) there and \(5, 3, 3, 3\) in this"):
        load_shrunk(resnet20(width=5), tmp_path / "small")


def test_a_network_of_which_only_blocks_were_removed_is_saved(tmp_path):
    model, x = vit()
    chosen = blocks(model, x)[:2]
    silence(model, chosen)
    small = shrink(model, chosen, x)
    save_shrunk(tmp_path, small)
    assert torch.equal(load_shrunk(vit()[0], tmp_path)(x), small(x))


def test_a_block_is_cut_off_where_all_that_closes_it_is_masked():
    model, x = mlp()
    found = blocks(model, x)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    assert pruned_units(found, masks) == ()
    masks["steps.0.fc1.weight"][:] = False
    masks["steps.1.fc2.weight"][:] = False
    masks["steps.2.fc2.weight"][1:] = False
    assert pruned_units(found, masks) == (found[1],)
    model, x = resnet()
    found = blocks(model, x)
    masks = {"layer1.0.bn2.weight": torch.zeros(4, dtype=torch.bool)}
    assert pruned_units(found, masks) == ()  # its bias is emitted
    assert pruned_units(found, masks | {"layer1.0.bn2.bias": torch.zeros(4, dtype=torch.bool)}) == (found[0],)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "count", "tensors"),
    [
        ("resnet18", {}, 5, BATCH_NORM),
        ("resnet50", {}, 12, ["bn3.weight", "bn3.bias"]),
        ("vit_tiny_patch16_224", {"img_size": 32}, 12, BRANCHES),
        ("deit3_small_patch16_224", {"img_size": 32, "depth": 2}, 2, ["ls1.gamma", "ls2.gamma"]),
        ("convnext_atto", {}, 12, ["gamma"]),
        ("mobilenetv3_small_050", {}, 7, ["bn3.weight", "bn3.bias"]),
    ],
)
def test_blocks_of_networks_of_timm_are_removed(name, settings, count, tensors):
    torch.manual_seed(0)
    model, x = settled(timm.create_model(name, num_classes=10, **settings)), torch.randn(2, 3, 32, 32)
    found = blocks(model, x)
    assert len(found) == count
    assert all(closing(unit) == tensors for unit in found)
    silence(model, found[::2])
    after = exact(model, x)
    made = exact(shrink(model, found[::2], x), x)
    assert (made - after).abs().max() <= 1e-9 * max(1.0, float(after.abs().max()))


# Refusals.


class Calls(nn.Module):
    """Calls its block in a way of its own."""

    def __init__(self, call):
        super().__init__()
        self.block, self.other, self.call = Step(4), nn.Linear(4, 4), call

    def forward(self, x):
        return self.call(self, x)


def tied():
    model = Calls(lambda self, x: self.other(self.block(x)))
    model.block.fc1 = nn.Linear(4, 4)
    model.block.fc2 = nn.Linear(4, 4)
    model.block.fc2.weight = model.other.weight
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Calls(lambda self, x: self.block(self.block(x))), "it runs 2 times in a forward pass"),
        (Calls(lambda self, x: self.block.fc1(x)), "it runs 0 times in a forward pass"),
        (Calls(lambda self, x: self.block(x=x)), "it is given something else than one tensor"),
        (tied(), "'block.fc2.weight' is used outside of it, too"),
    ],
)
def test_a_block_that_is_no_single_step_of_the_network_is_refused(model, message):
    with pytest.raises(ValueError, match=rf"'block' cannot be removed whole: {message}.* Leave it out\."):
        blocks(model, torch.randn(2, 4), names=["block"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer1.7"], r"'layer1\.7' matches no module\. Near names: 'layer1"),
        (
            ["layer2.0"],
            r"'layer2\.0' .*: it makes a tensor of shape \(2, 8, 4, 4\) from one of shape \(2, 4, 8, 8\), so",
        ),
        (["layer1.0.conv1"], r"'layer1\.0\.conv1' .*does not return its input of shape \(2, 4, 8, 8\) .* no identity"),
        (["layer1.0.shortcut"], r"'layer1\.0\.shortcut' cannot be removed whole: .* or computes nothing"),
        (["layer1", "layer1.2"], r"The block 'layer1\.2' lies inside the block 'layer1'\. Name one of them\."),
        (
            ["layer?.0.conv*"],
            r"CifarResNet has no block that can be removed with names=\('layer\?\.0\.conv\*',\): no mod",
        ),
        (["layer2.0", "layer3*"], r"'layer2\.0' cannot be removed whole"),
        ("layer1.*", r"names='layer1\.\*' is one string where a list of globs is meant"),
    ],
)
def test_names_that_are_no_blocks_are_refused_with_the_reason(names, message):
    model, x = resnet()
    with pytest.raises(ValueError, match=message):
        blocks(model, x, names=names)


def test_a_network_without_such_blocks_is_refused_with_some_reasons():
    effective = MLP(width=8)
    convert(effective, NMRule(2, 4))
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(
        ValueError, match=r"has no block .*: '0': it does not return its input .*; '1': it makes a tensor"
    ):
        blocks(plain, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"MLP cannot run in float64 on an input of shape \(2, 5\): RuntimeError"):
        blocks(MLP(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"call ops\.fold first"):
        blocks(effective, torch.zeros(2, 4))


def test_blocks_in_use_or_of_another_model_are_refused():
    model, x = resnet()
    found = blocks(model, x)
    with pytest.raises(
        ValueError, match=r"'layer1\.0' is still in use: 'layer1\.0\.bn2\.weight' is not 0\. Call silence"
    ):
        shrink(model, found[:1], x)
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()
    with pytest.raises(ValueError, match=r"'layer1\.0' is still in use: 'layer1\.0\.bn2\.bias' is not 0"):
        shrink(model, found[:1], x)
    for width in (3, 5):
        with pytest.raises(ValueError, match=rf"'layer1\.0' belongs to another model.*shape \({width},\)"):
            silence(resnet20(width=width), found[:1])
    with pytest.raises(ValueError, match=r"'layer1\.0' belongs to another model.*no such tensor"):
        shrink(Residual(), found[:1], x)
