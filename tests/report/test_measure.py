import dataclasses
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.models import LeNet300100, resnet20, timm_model
from sparsetrain.report import Report, cost, measure


def masks_of(module, density, *, names=None):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in module.named_parameters()
        if p.ndim > 1 and (names is None or name in names)
    }


@torch.no_grad()
def apply(module, masks):
    for name, mask in masks.items():
        module.get_parameter(name).masked_fill_(~mask, 0)


def test_counts_come_from_the_masks_and_not_from_zero_weights():
    network = nn.Linear(4, 3)
    nn.init.zeros_(network.weight)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0] = True
    report = measure(network, {"weight": mask})
    (layer,) = report.layers
    assert (layer.name, layer.shape, layer.total, layer.kept) == ("weight", (3, 4), 12, 4)
    assert (layer.sparsity, report.sparsity) == (8 / 12, 8 / 12)
    assert (report.parameters, report.maskable, report.kept, report.sparsity_of_all) == (15, 12, 4, 8 / 15)
    assert (report.dense_flops, report.theoretical_flops, layer.dense_flops) == (None, None, None)


def test_revived_counts_nonzero_and_nan_weights_under_a_false_mask():
    network = LeNet300100(input_shape=(1, 8, 8))
    masks = masks_of(network, 0.5)
    apply(network, masks)
    assert measure(network, masks).revived == 0
    with torch.no_grad():
        hidden = (~masks["fc2.weight"]).nonzero()
        network.fc2.weight[tuple(hidden[0])] = 1e-30
        network.fc2.weight[tuple(hidden[1])] = float("nan")
        network.fc2.weight[tuple(hidden[2])] = -0.0
    assert [layer.revived for layer in measure(network, masks).layers] == [0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_float_example_is_cast_to_the_modules_dtype_and_tokens_are_not(dtype):
    network = LeNet300100().to(dtype)
    assert measure(network, {}, torch.randn(1, 1, 28, 28)).dense_flops == 2 * 266_200
    assert sum(cost(network, torch.randn(1, 1, 28, 28)).values()) == 2 * 266_200
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).to(dtype)
    assert measure(tokens, {}, torch.zeros(1, 3, dtype=torch.int64)).dense_flops == 2 * 3 * 4 * 2


def test_lenet_flops_are_two_per_weight_and_theoretical_ones_two_per_kept_weight():
    network = LeNet300100()
    masks = masks_of(network, 0.3)
    report = measure(network, masks, torch.randn(5, 1, 28, 28))
    assert report.dense_flops == 2 * 266_200
    assert report.theoretical_flops == 2 * sum(int(mask.sum()) for mask in masks.values())
    assert [layer.theoretical_flops for layer in report.layers] == [2 * int(m.sum()) for m in masks.values()]


def test_resnet20_has_the_40_55_million_multiply_accumulates_of_the_formula():
    # Every 3x3 convolution of a stage, weights x pixels of its output; the parameter-free shortcuts multiply nothing.
    pixels = {16: 32 * 32, 32: 16 * 16, 64: 8 * 8}
    macs = 3 * 16 * 9 * pixels[16] + 64 * 10
    for in_width, width in ((16, 16), (16, 32), (32, 64)):
        macs += (in_width * width + 5 * width * width) * 9 * pixels[width]
    assert macs == 40_551_040
    assert measure(resnet20(shortcut="A"), {}, torch.zeros(1, 3, 32, 32)).dense_flops == 2 * macs


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_flops_are_the_formula_per_layer(groups, channels_last):
    network = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=groups), nn.ReLU(), nn.Conv2d(8, 2, (1, 3), padding=1))
    if channels_last:
        network.to(memory_format=torch.channels_last)
    report = measure(network, masks_of(network, 0.5), torch.zeros(2, 4, 9, 11))
    first = 2 * (8 * (4 // groups) * 9) * (4 * 5)
    second = 2 * (2 * 8 * 3) * (6 * 5)
    assert [layer.dense_flops for layer in report.layers] == [first, second]
    assert report.dense_flops == first + second


def test_operations_without_a_mask_keep_all_their_flops():
    network = LeNet300100(input_shape=(1, 8, 8))
    masks = masks_of(network, 0.25, names={"fc2.weight"})
    report = measure(network, masks, torch.zeros(1, 1, 8, 8))
    kept = int(masks["fc2.weight"].sum())
    assert report.theoretical_flops == 2 * (64 * 300 + kept + 100 * 10)


def test_attention_counts_projections_by_layer_and_products_in_the_total():
    length, width, hidden = 5, 16, 32
    network = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    report = measure(network, masks_of(network, 0.5), torch.randn(1, length, width))
    flops = {layer.name: layer.dense_flops for layer in report.layers}
    assert flops == {
        "self_attn.in_proj_weight": 2 * length * width * 3 * width,
        "self_attn.out_proj.weight": 2 * length * width * width,
        "linear1.weight": 2 * length * width * hidden,
        "linear2.weight": 2 * length * width * hidden,
    }
    assert report.dense_flops == sum(flops.values()) + 2 * 2 * length * length * width


def test_a_vision_transformers_flops_are_the_formula():
    network = timm_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    report = measure(network, {}, torch.zeros(1, 3, 32, 32))
    tokens, width, blocks = 5, 192, 12
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    assert report.dense_flops == 2 * (4 * 3 * 16 * 16 * width + blocks * block + width * 10)


def products(module, example):
    """FLOPs of one example, layer by layer, from the weights and what the layers put out: 2 for each product."""
    found = {}

    def note(name, layer):
        def hook(_, __, output):
            places = output[0].numel() // output.shape[1 if isinstance(layer, nn.Conv2d) else -1]
            found[name] = found.get(name, 0) + 2 * layer.weight.numel() * places

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(note(name, layer))
    with torch.no_grad():
        module.eval()(example[:1])
    return found


@pytest.mark.parametrize(
    ("make", "size", "attention"),
    [
        (lambda: resnet20(shortcut="B"), 16, 0),
        (lambda: LeNet300100((3, 8, 8)), 8, 0),
        (lambda: timm_model("resnet18", num_classes=10), 32, 0),
        (lambda: timm.create_model("vgg11_bn", num_classes=10, mlp_ratio=1 / 64), 32, 0),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=2),
            32,
            2 * 2 * 5 * 5 * 192,
        ),
    ],
    ids=["resnet20", "LeNet", "resnet18", "vgg11_bn", "vit_tiny"],
)
def test_the_cost_of_each_layer_is_that_of_its_products_and_adds_up_to_torchs_count(make, size, attention):
    network, example = make().eval(), torch.randn(2, 3, size, size)
    found = cost(network, example)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example[:1])
    assert sum(found.values()) == counter.get_total_flops() == measure(network, {}, example).dense_flops
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
    expected = products(network, example)
    if attention:  # of queries with keys, and of what comes out with values
        expected |= {f"blocks.{i}.attn": attention for i in range(2)}
    assert found == expected


def test_the_cost_of_a_product_outside_of_any_child_is_its_modules():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.layers[0](self.layers[1](x)) @ self.layers[0].weight

    assert cost(Mixed(), torch.ones(3, 4)) == {"layers.1": 32, "layers.0": 32, "": 32}


def test_weights_used_twice_or_through_functional_count_every_use():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.outer = nn.Linear(4, 4, bias=False)
            self.outer.weight = self.inner.weight

        def forward(self, x):
            return F.linear(self.outer(self.inner(x)), self.inner.weight)

    network = Tied()
    report = measure(network, masks_of(network, 0.5), torch.zeros(1, 4))
    assert [(layer.name, layer.dense_flops) for layer in report.layers] == [("inner.weight", 3 * 32)]
    assert report.parameters == 16


def test_a_compiled_network_is_counted_as_the_plain_one():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    masks, example = masks_of(network, 0.5), torch.zeros(1, 4)
    plain = measure(network, masks, example)
    network.compile(backend="eager")
    network(example)
    assert measure(network, masks, example) == plain
    assert plain.dense_flops == 2 * (12 + 6)


def test_bytes_are_values_only_and_masks_take_one_bit_a_weight():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5).to(torch.float16))
    masks = masks_of(network, 0.5)
    report = measure(network, masks)
    pruned = [int((~mask).sum()) for mask in masks.values()]
    assert report.dense_bytes == 4 * 12 + 2 * 20
    assert report.kept_bytes == report.dense_bytes - 4 * pruned[0] - 2 * pruned[1]
    assert report.mask_bytes == 2 + 2  # 9 and 15 bits


class Restless(nn.Module):
    """Draws random numbers, changes a buffer even in evaluation, and fails on demand."""

    def __init__(self, fail):
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = fail

    def forward(self, x):
        self.calls += 1
        x = self.linear(self.drop(self.norm(x + torch.randn_like(x))))
        if self.fail:
            raise RuntimeError("on demand")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_the_network_and_the_random_state_are_left_as_they_were(fail):
    network = Restless(fail)
    network.drop.eval()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    if fail:
        with pytest.raises(RuntimeError, match="on demand"):
            measure(network, {}, torch.randn(3, 4))
    else:
        assert measure(network, {}, torch.ones(3, 4)).dense_flops == 16
    random_state_after = torch.get_rng_state()
    assert fail or torch.equal(random_state, random_state_after)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert [m.training for m in network.modules()] == [True, True, False, True]
    assert all(p.grad is None for p in network.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_report_is_json_and_says_the_same():
    network = LeNet300100(input_shape=(1, 8, 8))
    report = measure(network, masks_of(network, 0.5), torch.zeros(1, 1, 8, 8))
    values = json.loads(json.dumps(report.to_dict()))
    assert {name: value for name, value in values.items() if name != "layers"} == {
        name: getattr(report, name) for name in values if name != "layers"
    }
    assert set(values) >= {field.name for field in dataclasses.fields(Report)}
    for layer, row in zip(report.layers, values["layers"], strict=True):
        assert {**row, "shape": tuple(row["shape"])} == {name: getattr(layer, name) for name in row}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc1.wieght": torch.ones(300, 64).bool()}, r"'fc1.wieght'.*Near names: fc1.weight"),
        ({"fc1.weight": torch.ones(64, 300).bool()}, r"\(64, 300\).*\(300, 64\)"),
        ({"fc1.weight": torch.ones(300, 64)}, r"bool tensor.*torch.float32"),
    ],
)
def test_masks_of_another_network_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        measure(LeNet300100(input_shape=(1, 8, 8)), masks)


class Query(nn.Module):
    """Gives a view of a parameter to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.layer = nn.Parameter(torch.ones(1, 2, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.latents.expand(len(x), -1, -1))


def test_a_view_of_a_parameter_as_input_is_counted():
    net = Query()
    net.layer.bias.requires_grad_(False)
    assert measure(net, {}, torch.zeros(1, 8)).dense_flops == 2 * 2 * 8 * 4
    assert [p.requires_grad for p in net.parameters()] == [True, True, False]


class Ramp(nn.Module):
    """Fills its buffer at its first call, or puts another one in its place."""

    def __init__(self, *, grows: bool) -> None:
        super().__init__()
        self.grows, self.filled, self.linear = grows, 0, nn.Linear(3, 3)
        self.stream = torch.Generator().manual_seed(2)
        self.register_buffer("ramp", torch.zeros(1 if grows else 3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.filled:
            self.filled = 3
            if self.grows:
                self.ramp = torch.linspace(0, 1, 3)
            else:
                self.ramp.copy_(torch.linspace(0, 1, 3))
        return self.linear(x + self.ramp + torch.rand(3, generator=self.stream))


@pytest.mark.parametrize("grows", [True, False])
def test_a_buffer_that_forward_fills_once_is_filled_at_the_first_call_after_counting_too(grows):
    module = Ramp(grows=grows)
    buffer, drawn = module.ramp, module.stream.get_state()
    cost(module, torch.zeros(1, 3))
    assert module.ramp is buffer
    assert not module.ramp.any()
    assert torch.equal(module.stream.get_state(), drawn)
    module(torch.zeros(1, 3))
    assert torch.equal(module.ramp, torch.linspace(0, 1, 3))


def test_a_layer_that_forward_makes_at_its_first_call_is_made_by_the_first_call_after_counting():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), None

        def forward(self, x: Tensor) -> Tensor:
            if self.head is None:
                self.head = nn.Linear(3, 2)
                self.register_buffer("seen", torch.ones(1), persistent=False)
            return self.head(self.body(x))

    module = Late()
    cost(module, torch.zeros(1, 3))
    assert [*module.state_dict()] == ["body.weight", "body.bias"]
    assert module.head is None
    module(torch.zeros(1, 3))
    assert module.head in module.modules()
