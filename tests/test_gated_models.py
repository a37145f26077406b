"""Gates closed on real architectures, and the smaller networks that are left of them."""

import pytest
import timm
import torch
from torch import nn

from sparsetrain import Selection, export
from sparsetrain.callbacks.gated import close_, closed_units, gated_layers, operations
from sparsetrain.gates import StaticGates
from sparsetrain.models import CifarResNet
from sparsetrain.polarization import Consensus, expected_cost
from sparsetrain.report import cost

CLASSES = 5


def cifar_resnet(depth: int) -> nn.Module:
    return CifarResNet(depth, CLASSES, width=4)


def timm_model(name: str, **settings: float) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **settings)
    return model


TRANSFORMER = {"img_size": 32, "patch_size": 8, "depth": 2}
# Name -> how it is made, and how many of its layers are gated: the inner ones of blocks and of plain stacks, and in
# transformers the heads and the hidden units of each block.
GATED = {
    "resnet20": (lambda: cifar_resnet(20), 9),
    "resnet56": (lambda: cifar_resnet(56), 27),
    "resnet18": (lambda: timm_model("resnet18"), 8),
    "resnet50": (lambda: timm_model("resnet50"), 32),
    "vgg11_bn": (lambda: timm_model("vgg11_bn", mlp_ratio=1 / 64), 10),
    "mobilenetv3": (lambda: timm_model("mobilenetv3_small_050"), 14),
    "vit_tiny": (lambda: timm_model("vit_tiny_patch16_224", **TRANSFORMER), 4),
    "deit_tiny": (lambda: timm_model("deit_tiny_patch16_224", **TRANSFORMER), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
def test_a_network_with_closed_gates_and_the_smaller_one_have_the_same_outputs_and_cost(name):
    make, count = GATED[name]
    torch.manual_seed(0)
    model = make().double().eval()
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    layers = gated_layers(model, export.units(model, example), Selection())
    assert len(layers) == count
    whole, opened, gates = operations(model, layers, example, "flops"), {}, []
    for layer in layers:
        own = StaticGates(len(layer.units), name=layer.name, axis=layer.axis).double()
        with torch.no_grad():
            own.free[torch.rand(len(layer.units)) < 0.5] = -1.0
            own.free[0] = 1.0
        layer.attach(model, own)
        opened[layer.name] = own.free >= 0
        gates.append(own)
    with torch.no_grad():
        gated = model(example)
        for own in gates:
            own.detach()
        read = [f"{layer.reader}.weight" for layer in layers]
        masks = {weight: torch.ones_like(model.get_parameter(weight), dtype=torch.bool) for weight in read}
        close_(layers, opened, masks)
        for weight, mask in masks.items():
            model.get_parameter(weight).masked_fill_(~mask, 0)
        small = export.shrink(model, closed_units(layers, masks), example)
        torch.testing.assert_close(small(example), gated, rtol=0, atol=1e-9)
    left = sum(cost(small, example).values())
    assert left == pytest.approx(float(expected_cost({name: mask.double() for name, mask in opened.items()}, whole)))
    assert left < sum(cost(model, example).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
def test_channel_gates_meet_the_budget_within_a_point(name):
    torch.manual_seed(0)
    model, example = GATED[name][0]().eval(), torch.randn(1, 3, 32, 32)
    layers = gated_layers(model, export.units(model, example), Selection())
    for measure in ("flops", "params"):
        whole = operations(model, layers, example, measure)
        for budget in (0.7, 0.5):
            consensus = Consensus()
            consensus.observe({layer.name: torch.randn(8, len(layer.units)) for layer in layers})
            assert consensus.fill_to_budget(whole, budget).cost == pytest.approx(budget - 0.005, abs=0.005)
