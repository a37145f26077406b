import pytest
import torch
from torch import nn

from sparsetrain.models import CifarResNet, resnet20, resnet32, resnet56


def parameters_by_formula(depth: int, shortcut: str, num_classes: int = 10, first: int = 16) -> int:
    """Section 4.2 written out: convolutions without bias, one BatchNorm (scale and shift) after each."""
    n = (depth - 2) // 6
    total = 3 * first * 9 + 2 * first
    for in_width, width in ((first, first), (first, 2 * first), (2 * first, 4 * first)):
        total += in_width * width * 9 + (2 * n - 1) * width * width * 9 + 2 * n * 2 * width
        if shortcut == "B" and in_width != width:
            total += in_width * width + 2 * width
    return total + 4 * first * num_classes + num_classes


@pytest.mark.parametrize(("shortcut", "parameters"), [("A", 269_722), ("B", 272_474)])
def test_resnet20_has_the_published_number_of_parameters(shortcut, parameters):
    network = resnet20(shortcut=shortcut)
    assert sum(p.numel() for p in network.parameters()) == parameters == parameters_by_formula(20, shortcut)


@pytest.mark.parametrize(("factory", "depth"), [(resnet20, 20), (resnet32, 32), (resnet56, 56)])
def test_the_depth_counts_the_layers_on_the_longest_path(factory, depth):
    network = factory(num_classes=7, shortcut="A", in_channels=1)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == depth
    parameters = sum(p.numel() for p in factory(num_classes=7).parameters())
    assert parameters == parameters_by_formula(depth, "B", num_classes=7)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_half_the_width_halves_the_channels_of_every_stage():
    network = resnet20(width=8)
    assert sum(p.numel() for p in network.parameters()) == parameters_by_formula(20, "B", first=8)


def test_shortcut_a_passes_every_second_pixel_and_zeros_in_the_new_channels():
    block = CifarResNet(8, shortcut="A").layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()


def test_plain_networks_have_no_path_around_a_convolution():
    network = resnet20(shortcut="none").eval()
    assert sum(p.numel() for p in network.parameters()) == parameters_by_formula(20, "none") == 269_722
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(*network(images))
    nn.init.zeros_(network.layer2[1].conv1.weight)
    assert torch.equal(*network(images))


def test_blocks_that_keep_their_shape_have_no_shortcut_parameters():
    shortcuts = {name.split(".shortcut")[0] for name, _ in resnet20().named_parameters() if ".shortcut" in name}
    assert shortcuts == {"layer2.0", "layer3.0"}


def test_weights_are_kaiming_normal_and_batchnorm_starts_as_identity():
    network = resnet20()
    weight = network.layer3[2].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.all(norm.weight == 1) and not norm.bias.any() for norm in norms)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "6n \\+ 2"),
        ({"depth": 2}, "6n \\+ 2"),
        ({"depth": 20, "shortcut": "C"}, "'A'.*'B'.*'C'"),
        ({"depth": 20, "num_classes": 1}, "at least 2 classes"),
        ({"depth": 20, "width": 0}, "at least 1 channel"),
    ],
)
def test_bad_arguments_are_refused_with_the_legal_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(**arguments)
