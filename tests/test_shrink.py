"""Units are removed from every tensor that holds them and the outputs stay what they were, or the layer is named."""

import copy
import json
import random
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsetrain import Channel, Global, Pruning, Selection, Uniform, prune
from sparsetrain.export import Slice, load_shrunk, pruned_units, save_shrunk, shrink, silence, units
from sparsetrain.models import GPT, LeNet300100, resnet20
from sparsetrain.report import cost


class Residual(nn.Module):
    """A stem, a block whose shortcut couples it to the stem, and a classifier."""

    def __init__(self, padding=0):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=padding, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        hidden = F.relu(self.bn1(self.conv1(x)))
        side = x if self.conv2.padding == (1, 1) else x[:, :, 1:-1, 1:-1]
        return self.fc(F.relu(side + self.bn2(self.conv2(hidden))).mean((2, 3)))


class Standardized(nn.Conv1d):
    """Its weights have mean 0 and variance 1 for each output channel, so that zeros do not stay zeros."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2), keepdim=True)) / self.weight.std((1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias)


class Padded(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1)))


def settled(model, seed=0):
    """`model` with normalization that shifts, scales and remembers, in evaluation mode."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                for tensor in (layer.weight, layer.running_var):
                    tensor.uniform_(0.5, 2.0, generator=stream)
                for tensor in (layer.bias, layer.running_mean):
                    tensor.normal_(generator=stream)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # layer scale, which begins at 1e-6 and would hide all differences
                parameter.uniform_(0.5, 1.0, generator=stream)
    return model.eval()


def residual(padding=0):
    torch.manual_seed(1)
    return settled(Residual(padding)), torch.randn(2, 3, 9, 9)


def some(found, share=0.4):
    """Units of each layer, never all."""
    stream = torch.Generator().manual_seed(2)
    return [u for u in found if torch.rand((), generator=stream) < share and not u.name.endswith("[0]")]


@torch.no_grad()
def exact(model, x):
    return copy.deepcopy(model).double().eval()(x.double() if x.is_floating_point() else x)


def assert_shrinks(model, x):
    """Removing units gives what zeroing their outputs gives, and that is something else than before."""
    chosen = some(units(model, x))
    before = exact(model, x)
    silence(model, chosen)
    small = shrink(model, chosen, x)
    after, made = exact(model, x), exact(small, x)
    assert (made - after).abs().max() <= 1e-9 * max(1.0, float(after.abs().max()))
    assert (before - after).abs().max() > 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert sum(cost(small, x).values()) < 0.9 * sum(cost(model, x).values())
    return small


def test_a_unit_lies_in_all_tensors_that_share_its_channel():
    model, x = residual()
    found = {unit.name: unit for unit in units(model, x)}
    assert list(found) == [f"stem[{i}]" for i in range(6)] + [f"conv1[{i}]" for i in range(8)]
    inner = found["conv1[3]"]
    assert set(inner.slices) == {
        Slice("conv1.weight", 0, (3,), "writes"),
        *(Slice(f"bn1.{name}", 0, (3,), "carries") for name in ("weight", "bias", "running_mean", "running_var")),
        Slice("conv2.weight", 1, (3,), "reads"),
    }
    assert {s.tensor for s in found["stem[2]"].part("writes")} == {"stem.weight", "stem.bias", "conv2.weight"}
    assert {s.tensor for s in found["stem[2]"].part("reads")} == {"conv1.weight", "fc.weight"}


def gpt():
    return GPT(20, 16, layers=1, width=32, heads=4), torch.randint(0, 20, (2, 12))


@pytest.mark.parametrize("make", [residual, gpt])
def test_the_cost_of_a_unit_is_what_goes_with_it_alone(make):
    model, x = make()
    dense = sum(cost(model, x).values()), sum(p.numel() for p in model.parameters())
    for unit in units(model, x)[::5]:
        silenced = copy.deepcopy(model)
        silence(silenced, [unit])
        small = shrink(silenced, [unit], x)
        assert unit.flops == dense[0] - sum(cost(small, x).values()) > 0
        assert unit.parameters == dense[1] - sum(p.numel() for p in small.parameters()) > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: (resnet20(shortcut="A", width=8), torch.randn(2, 3, 8, 8)),
        lambda: (resnet20(shortcut="B", width=8), torch.randn(2, 3, 8, 8)),
        lambda: (LeNet300100((1, 8, 8)), torch.randn(2, 1, 8, 8)),
        gpt,
        lambda: (nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), torch.randn(2, 5, 16)),
    ],
    ids=["resnet20 A", "resnet20 B", "LeNet", "GPT", "hidden units beside multi-head attention"],
)
def test_a_smaller_network_computes_what_the_silenced_one_does(make):
    torch.manual_seed(0)
    model, x = make()
    assert_shrinks(settled(model), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {}),
        ("vgg11_bn", {"mlp_ratio": 1 / 64}),
        ("mobilenetv3_small_050", {}),
        ("efficientnet_b0", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        ("deit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_networks_of_timm_shrink(name, settings):
    torch.manual_seed(0)
    model = settled(timm.create_model(name, num_classes=10, **settings))
    assert_shrinks(model, torch.randn(2, 3, 32, 32))


def test_heads_of_a_vision_transformer_are_removed_whole():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=1, embed_dim=12)
    x = torch.randn(2, 3, 32, 32)
    heads = [unit for unit in units(model, x) if unit.name.startswith("blocks.0.attn[")]
    assert [unit.name for unit in heads] == [f"blocks.0.attn[{i}]" for i in range(3)]
    silence(model, heads[1:2])
    small = shrink(model, heads[1:2], x)
    assert small.blocks[0].attn.qkv.weight.shape == (24, 12)
    assert small.blocks[0].attn.num_heads == 2
    assert torch.equal(small.blocks[0].attn.qkv.weight[12:16], model.blocks[0].attn.qkv.weight[20:24])
    torch.testing.assert_close(exact(small, x), exact(model, x), rtol=0, atol=1e-9)


def test_the_copy_is_an_ordinary_module_and_the_original_is_untouched():
    model, x = residual()
    model.conv1.weight.requires_grad_(False)
    model.train()
    model.bn1.eval()
    chosen = some(units(model, x))
    silence(model, chosen)
    state = copy.deepcopy(model.state_dict())
    small = shrink(model, chosen, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [layer.training for layer in model.modules()] == [layer.training for layer in small.modules()]
    assert [(n, p.requires_grad, p.dtype) for n, p in small.named_parameters()] == [
        (n, p.requires_grad, p.dtype) for n, p in model.named_parameters()
    ]
    small(x).sum().backward()
    assert small.conv1.out_channels == small.bn1.num_features == small.conv2.in_channels == len(small.conv1.weight) < 8
    exported = torch.export.export(small.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


# A channel of zero weights still emits what its bias or batch norm makes of zeros.


def pruned(model, x, names, axis=0, sparsity=0.5):
    """`model` with channels pruned by magnitude, and the units that its masks cut off."""
    found = units(model, x)
    pattern = Channel(axis)
    masks = prune(model, sparsity, Pruning(Selection(include=names), allocation=Uniform(), pattern=pattern))
    return pruned_units(found, masks)


def test_the_constant_of_a_pruned_channel_moves_into_the_bias_of_what_reads_it():
    model, x = residual(padding=0)
    chosen = pruned(model, x, ("conv1.weight",))
    assert len(chosen) == 4
    small = shrink(model, chosen, x)
    assert small.conv1.weight.shape[0] == 4
    assert small.conv2.bias is not None
    torch.testing.assert_close(exact(small, x), exact(model, x), rtol=0, atol=1e-6)  # its bias is rounded to float32
    model.double()
    small = shrink(model, chosen, x)
    assert (exact(small, x) - exact(model, x)).abs().max() <= 1e-9
    naive = copy.deepcopy(model)
    silence(naive, chosen)  # what comes out when the constant is dropped
    assert (exact(naive, x) - exact(model, x)).abs().max() > 1e-2


def test_linear_layers_take_up_the_biases_of_pruned_hidden_units_also_without_a_bias_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    chosen = pruned(model, x, ("0.weight", "2.weight"))
    small = shrink(model, chosen, x)
    assert [tuple(p.shape) for p in small.parameters()] == [(4, 6), (4,), (4, 4), (4,), (3, 4), (3,)]
    assert (exact(small, x) - exact(model, x)).abs().max() <= 1e-9


def test_a_constant_that_is_padded_with_zeros_is_refused_unless_it_is_zero():
    model, x = residual(padding=1)
    chosen = pruned(model, x, ("conv1.weight",))
    with pytest.raises(ValueError, match=r"'conv1\[\d\]' .*emits a constant.*'conv2' pads it.*Channel\(axis=1\)"):
        shrink(model, chosen, x)
    with torch.no_grad():
        for unit in chosen:  # relu(shift) is 0 where the shift is not positive
            (index,) = unit.part("writes")[0].index
            model.bn1.bias[index], model.bn1.running_mean[index] = -0.5, 0.0
    assert (exact(shrink(model, chosen, x), x) - exact(model, x)).abs().max() <= 1e-9


def test_pruned_input_channels_are_removed_exactly_whatever_their_norms_emit():
    model, x = residual(padding=1)
    chosen = pruned(model, x, ("conv2.weight",), axis=1)
    assert len(chosen) == 4
    small = shrink(model, chosen, x)
    assert small.conv2.bias is None
    assert (exact(small, x) - exact(model, x)).abs().max() <= 1e-9


def test_a_constant_that_is_gated_by_the_input_is_no_constant():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.up(x)
            return self.down(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    model, x = Gated(), torch.randn(1, 3, 5, 5)  # one example: the gate does not vary over it
    unit = units(model, x)[1]
    with torch.no_grad():
        model.up.weight[1] = 0
        model.gate.weight[2] = 0
    assert {piece.tensor for piece in unit.part("writes")} == {"up.weight", "up.bias", "gate.weight", "gate.bias"}
    with pytest.raises(ValueError, match=r"'up\[1\]' is still in use: 'gate.weight' writes it and"):
        shrink(model, [unit], x)
    with torch.no_grad():
        model.gate.weight[1] = 0
    assert (exact(shrink(model.double(), [unit], x), x) - exact(model, x)).abs().max() <= 1e-9


def test_a_shared_channel_is_cut_off_only_where_all_that_write_it_or_all_that_read_it_are_pruned():
    model, x = residual()
    found = units(model, x)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1}
    masks["stem.weight"][:4] = False
    assert pruned_units(found, masks) == ()
    masks["conv2.weight"][2:5] = False
    masks["conv1.weight"][:, 0] = False
    assert [unit.name for unit in pruned_units(found, masks)] == ["stem[2]", "stem[3]"]
    masks["fc.weight"][:, 0] = False
    assert [unit.name for unit in pruned_units(found, masks)] == ["stem[0]", "stem[2]", "stem[3]"]
    assert pruned_units(found, {}) == ()


# Refusals.


def test_units_in_use_of_another_model_or_of_a_whole_layer_are_refused():
    model, x = residual()
    found = units(model, x)
    with pytest.raises(ValueError, match=r"'stem\[0\]' is still in use: 'stem.weight' writes it and 'conv1"):
        shrink(model, found[:1], x)
    with pytest.raises(ValueError, match=r"Nothing would be left of 'conv1.weight' along dimension 0"):
        shrink(model, [unit for unit in found if unit.name.startswith("conv1")], x)
    for refused in (shrink, lambda *arguments: silence(*arguments[:2])):
        with pytest.raises(ValueError, match=r"'stem\[5\]' belongs to another model.*'stem.weight' at 5 of .*\(4,"):
            refused(Narrow(), found[5:6], x)


class Narrow(Residual):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)


class Fixed(nn.Module):
    """Uses the number of its channels in a way that no graph shows."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.mix, self.last, self.use = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Conv2d(4, 2, 1), use

    def forward(self, x):
        return self.last(self.mix(self.use(self.conv(x))))


@pytest.mark.parametrize("use", [lambda x: x.softmax(1), lambda x: x + torch.ones(1, 4, 1, 1, dtype=x.dtype)])
def test_a_model_that_needs_the_channel_is_refused_by_the_name_of_the_layer(use):
    model, x = Fixed(use), torch.randn(2, 3, 4, 4)
    unit = units(model, x)[1:2]
    silence(model, unit)
    with pytest.raises(RuntimeError, match=r"layer '(last|mix)' of Fixed is the first to compute something else"):
        shrink(model, unit, x)


class Several(nn.Module):
    """A hidden layer with batch norm, whose values go further in the way of `use`."""

    def __init__(self, use):
        super().__init__()
        self.hidden, self.norm, self.use = nn.Linear(6, 8), nn.BatchNorm1d(8), use
        self.head, self.aux = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.use(self, torch.relu(self.norm(self.hidden(x))))


def with_features(model, x):
    return {"logits": model.head(x), "features": x.detach()}


def with_aux_in_training(model, x):
    return (model.head(x), model.aux(x)) if model.training else model.head(x)


def with_features_in_training(model, x):
    return (model.head(x), x.detach()) if model.training else model.head(x)


def silenced(model, x):
    chosen = units(model, x)[:3]
    silence(model, chosen)
    return chosen


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            with_features,
            r"Several has outputs of shapes \[\(1, 3\), \(1, 5\)\] in place of \[\(1, 3\), \(1, 8\)\]",
        ),
        (
            with_aux_in_training,
            r"layer 'aux' of Several is the first .* in training mode .* or delete it once",
        ),
        (
            with_features_in_training,
            r"in training mode has outputs of shapes \[\(2, 3\), \(2, 5\)\] in place of",
        ),
    ],
)
def test_a_channel_that_an_output_or_a_layer_uses_unseen_is_not_cut_from_it(use, message):
    model, x = Several(use), torch.randn(1, 6)
    with pytest.raises(RuntimeError, match=message):
        shrink(model, silenced(model, x), x)


def test_what_wants_more_than_the_example_in_training_shrinks_all_the_same():
    def use(model, x):
        assert not model.training, "give targets, too"
        return model.head(x)

    model, x = Several(use), torch.randn(2, 6)
    assert shrink(model, silenced(model, x), x).hidden.out_features == 5


def test_in_one_of_several_processes_training_mode_is_not_tried_as_it_might_wait_for_the_others(monkeypatch):
    modes = []
    model, x = Several(lambda model, x: modes.append(model.training) or model.head(x)), torch.randn(2, 6)
    chosen = silenced(model, x)
    shrink(model.eval(), chosen, x)
    assert modes[-2:] == [True, True]
    modes.clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shrink(model, chosen, x)
    assert not any(modes)


def test_shrinking_moves_no_random_stream_and_no_statistics():
    def use(model, x):
        return model.head(F.dropout(x, training=model.training)) * (random.random() if model.training else 1)

    model, x = Several(use), torch.randn(2, 6)
    chosen = silenced(model, x)
    before = torch.get_rng_state(), random.getstate(), copy.deepcopy(model.state_dict())
    small = shrink(model, chosen, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert int(small.norm.num_batches_tracked) == 0
    assert small.training


def test_a_model_that_casts_to_a_fixed_dtype_is_refused_as_it_cannot_run_in_float64():
    class Casting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float() / 255)

    model, x = Casting(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randint(0, 255, (2, 6), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"Casting cannot run in float64 .* \(2, 6\): RuntimeError: .*cast to that of"):
        shrink(model, silenced(model, x), x)


@pytest.mark.filterwarnings("ignore:Maximum recursive depth reached")
def test_reshapes_that_torch_pruning_cannot_follow_do_not_take_all_memory():
    model = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    names = {f"features.{block}.0.mlp.0[{place}]" for block in (1, 3) for place in range(5)}
    hidden = [unit for unit in units(model, x) if unit.name in names]
    assert len(hidden) == 10
    silence(model, hidden)
    small = shrink(model, hidden, x)
    torch.testing.assert_close(small(x), model(x))
    assert small.features[1][0].mlp[0].out_features == model.features[1][0].mlp[0].out_features - 5


class Neighbours(nn.Module):
    """Efficient channel attention: the gate of a channel is made of its neighbours in the order of channels."""

    def __init__(self):
        super().__init__()
        self.first, self.over, self.last = nn.Conv2d(3, 8, 1), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        gate = self.over(x.mean((2, 3)).view(len(x), 1, -1)).view(len(x), -1, 1, 1)
        return self.last(x * gate.sigmoid())


def unflattened():
    return nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 2, 1))


@pytest.mark.parametrize(
    ("model", "shape", "tensor"), [(Neighbours(), (2, 3, 4, 4), "over.weight"), (unflattened(), (2, 4), "2.weight")]
)
def test_channels_that_another_layer_takes_together_are_no_units(model, shape, tensor):
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} has no removable .*'{tensor}' takes several channels"
    ):
        units(model, torch.randn(shape))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
            "a LayerNorm, which is not known to keep channels apart",
        ),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2)), "a Conv1d with groups=2"),
        (
            nn.Sequential(nn.Conv1d(4, 4, 1), Standardized(4, 4, 3)),
            "a Standardized that does not multiply by its weight as it is",
        ),
        (nn.Linear(4, 4), "an output of the network"),
        (nn.ReLU(), "no layer has weights"),
    ],
)
def test_a_model_without_removable_channels_is_refused_with_the_reasons(model, message):
    with pytest.raises(ValueError, match=message):
        units(model, torch.randn(2, 4, 4))


def test_a_convolution_of_ones_own_that_multiplies_by_its_weight_is_cut():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(4, 6, 1), nn.ReLU(), Padded(6, 4, 3)), torch.randn(2, 4, 5)
    chosen = units(model, x)[::2]
    silence(model, chosen)
    small = shrink(model, chosen, x)
    torch.testing.assert_close(small(x), model(x))
    assert small[2].in_channels == 3


def test_a_model_that_cannot_run_the_example_is_refused():
    with pytest.raises(ValueError, match=r"cannot trace Residual on an input of shape \(2, 5\)"):
        units(Residual(), torch.zeros(2, 5))


def test_without_torch_pruning_units_are_refused_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsetrain\[shrink\]'"):
        units(nn.Linear(2, 2), torch.zeros(1, 2))


# Files.


def test_a_network_that_was_shrunk_twice_is_rebuilt_from_its_base_model(tmp_path):
    base, x = residual()
    chosen = pruned(base, x, ("conv1.weight",))
    once = shrink(base, chosen, x)  # conv2 has got a bias
    more = some(units(once, x))
    silence(once, more)
    twice = shrink(once, more, x)
    with torch.no_grad():
        twice.fc.bias.add_(1)  # trained on
    save_shrunk(tmp_path / "small", twice)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["architecture.json", "model.safetensors"]
    loaded = load_shrunk(Residual(), tmp_path / "small")
    assert loaded.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.eval()(x), twice(x))
    save_shrunk(tmp_path / "again", loaded)
    assert (tmp_path / "again/architecture.json").read_text() == (tmp_path / "small/architecture.json").read_text()


def test_heads_and_tied_weights_are_rebuilt(tmp_path):
    base, x = gpt()
    chosen = some(units(base, x))
    silence(base, chosen)
    small = shrink(base, chosen, x)
    save_shrunk(tmp_path, small)
    loaded = load_shrunk(gpt()[0], tmp_path)
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.blocks[0].attn.heads == small.blocks[0].attn.heads < 4
    assert torch.equal(loaded(x), small(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False)
        self.net = nn.Sequential(nn.Sequential(*layers))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("axis", [0, 1], ids=["with a new bias", "without"])
def test_parts_of_a_smaller_network_are_saved_by_themselves_also_of_a_loaded_one(tmp_path, axis):
    torch.manual_seed(0)
    base, x = settled(Outer()), torch.randn(4, 6)
    small = shrink(base, pruned(base, x, ("net.0.0.weight", "net.0.3.weight")[axis:][:1], axis), x)
    save_shrunk(tmp_path / "whole", small)
    for number, model in enumerate((small, load_shrunk(Outer(), tmp_path / "whole").eval())):
        for name in ("net", "net.0", "net.0.3"):
            save_shrunk(tmp_path / f"{name} {number}", model.get_submodule(name))
            made = load_shrunk(Outer().get_submodule(name), tmp_path / f"{name} {number}").eval()
            given = torch.randn(4, 4) if name == "net.0.3" else x
            assert torch.equal(made(given), small.get_submodule(name)(given))
    with pytest.raises(ValueError, match=r"Nothing was removed from this ReLU"):
        save_shrunk(tmp_path / "part", small.net[0][2])


def test_another_base_model_is_refused_by_name_and_shape(tmp_path):
    base, x = residual()
    with pytest.raises(ValueError, match=r"Nothing was removed from this Residual"):
        save_shrunk(tmp_path, base)
    chosen = pruned(base, x, ("conv2.weight",), axis=1)
    save_shrunk(tmp_path, shrink(base, chosen, x))
    with pytest.raises(ValueError, match=r"'stem.weight' is \(6, 3, 3, 3\) there and \(4, 3, 3, 3\) in this Narrow"):
        load_shrunk(Narrow(), tmp_path)
    with pytest.raises(ValueError, match=r"'stem.weight' is \(6, 3, 3, 3\) there and missing in this Linear"):
        load_shrunk(nn.Linear(2, 2), tmp_path)
    file = tmp_path / "architecture.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(ValueError, match=r"has format 2; this version reads 1"):
        load_shrunk(Residual(), tmp_path)


def test_channels_pruned_by_one_ranking_make_a_smaller_resnet():
    torch.manual_seed(0)
    model, x = settled(resnet20(shortcut="A", width=8)), torch.randn(2, 3, 8, 8)
    found = units(model, x)
    pruning = Pruning(Selection(include=("layer*.conv2.weight",)), allocation=Global(), pattern=Channel(axis=1))
    masks = prune(model, 0.5, pruning)
    chosen = pruned_units(found, masks)
    assert {unit.name for unit in chosen} == {
        f"{name.replace('conv2.weight', 'conv1')}[{index}]"
        for name, mask in masks.items()
        for index in (~mask.any(3).any(2).any(0)).nonzero().flatten().tolist()
    }
    assert (exact(shrink(model, chosen, x), x) - exact(model, x)).abs().max() <= 1e-9


class DropsTokens(nn.Module):
    """Leaves out tokens at random while it trains, after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.drop, self.write = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.read(x).relu())
        if self.training:
            h = h[:, torch.rand(h.shape[1]) > 0.5]
        return self.write(h)


@pytest.mark.parametrize("seed", range(6))
def test_outputs_of_random_shapes_in_training_do_not_prevent_a_smaller_network(seed):
    torch.manual_seed(seed)
    model, x = DropsTokens(), torch.randn(2, 12, 4)
    chosen = units(model, x)[:3]
    silence(model, chosen)
    assert shrink(model, chosen, x).read.out_features == 5


def test_a_network_whose_modules_have_versions_is_saved_and_loaded(tmp_path):
    def make():
        torch.manual_seed(0)
        return torchvision.models.mnasnet0_5(num_classes=5).eval()

    net, x = make(), torch.randn(2, 3, 32, 32)
    chosen = units(net, x[:1])[:3]
    silence(net, chosen)
    small = shrink(net, chosen, x[:1])
    save_shrunk(tmp_path, small)
    assert torch.equal(load_shrunk(make(), tmp_path)(x), small(x))


@pytest.mark.parametrize("new", [nn.Linear(6, 7), nn.Sequential(nn.Linear(6, 4))])
def test_a_layer_that_was_replaced_after_shrinking_is_not_saved(tmp_path, new):
    model, x = residual()
    small = shrink(model, silenced(model, x), x)
    small.fc = new
    with pytest.raises(ValueError, match=r"'fc\..*a layer was replaced after it"):
        save_shrunk(tmp_path, small)
    assert not list(tmp_path.iterdir())


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    net, example = Residual(), torch.zeros(1, 3, 8, 8)
    chosen = units(net, example)[:1]
    silence(net, chosen)
    save_shrunk(tmp_path, shrink(net.eval(), chosen, example))
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    name = next(iter(saved))
    del saved[name]
    save_file(saved, file)
    with pytest.raises(ValueError, match=f"lacks '{name}'. Save the network again"):
        load_shrunk(Residual(), tmp_path)


@pytest.mark.parametrize("kind", [tuple, list, lambda both: dict(zip("ab", both, strict=True))])
def test_channels_of_an_output_that_the_network_reads_too_are_no_units(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            features = self.b(self.a(x).relu()).relu()
            return kind((self.head(features), features))

    assert {unit.name[0] for unit in units(Two(), torch.randn(2, 4))} == {"a"}
