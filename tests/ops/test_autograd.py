"""Values and gradients of the effective layers are the three formulas."""

import itertools

import pytest
import torch
from ops import slow
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.ops import NMRule, convert, effective_layers

RATIOS = [(2, 4), (1, 4), (2, 8), (4, 8)]
BACKWARDS = ["dense", "bidirectional", "transposable"]
RULES = [(n, m, backward) for n, m in RATIOS for backward in BACKWARDS if m < 6 or backward != "transposable"]


def effective_weights(weight, rule):
    """W_f and W_b by the slow masks."""
    forward = slow.group_mask(weight, rule.n, rule.m, 1)
    backward = slow.group_mask(weight, rule.n, rule.m, 0) if rule.backward == "bidirectional" else forward
    if rule.backward == "transposable":
        forward = backward = rule.mask(weight)
    return weight.detach() * forward, weight.detach() * backward


def gradients(layer, x, g):
    """The result y, and dx, dW, db."""
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x, layer.weight] if layer.bias is None else [x, layer.weight, layer.bias]
    return y.detach(), *torch.autograd.grad(y, wanted, g)


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=False):  # no bias, no db
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance


def awkward(shape, kind):
    """Gradients as they arrive from sums, transposes and slices."""
    if kind == "expanded":
        return torch.randn((), dtype=torch.float64).expand(shape)
    if kind == "transposed":
        return torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape))))
    if kind == "sliced":
        return torch.randn((*shape[:-1], 2 * shape[-1]), dtype=torch.float64)[..., ::2]
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["plain", "expanded", "transposed", "sliced"])
@pytest.mark.parametrize(("n", "m", "backward"), RULES)
def test_linear_is_the_three_formulas(n, m, backward, kind):
    rule = NMRule(n, m, backward=backward)
    for bias, leading in itertools.product((True, False), ((), (5,), (2, 3), (2, 1, 3))):
        layer = nn.Linear(3 * m, 2 * m, bias=bias, dtype=torch.float64)
        expected_weights = effective_weights(layer.weight, rule)
        convert(layer, rule)
        x = awkward((*leading, 3 * m), kind)
        g = awkward((*leading, 2 * m), kind)
        assert_close(gradients(layer, x, g), slow.linear(x, *expected_weights, layer.bias, g))


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
]


def padding_of(layer):
    """(left, right, top, bottom), by the definition of "same": the odd one goes to the right."""
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    height, width = (0, 0) if layer.padding == "valid" else layer.padding
    return (width, width, height, height)


@pytest.mark.slow
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution_is_the_three_formulas(options, backward):
    for (n, m), bias in itertools.product(RATIOS if backward != "transposable" else RATIOS[:2], (True, False)):
        rule = NMRule(n, m, backward=backward)
        layer = nn.Conv2d(2 * m, 4 * m, bias=bias, dtype=torch.float64, **options)
        expected_weights = effective_weights(layer.weight, rule)
        x = torch.randn(2, 2 * m, 7, 6, dtype=torch.float64)
        geometry = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
        convert(layer, rule)
        shape = layer(x).shape
        for kind, memory_format in itertools.product(
            ("plain", "expanded", "transposed", "sliced"), (torch.contiguous_format, torch.channels_last)
        ):
            layer.to(memory_format=memory_format)
            g = awkward(shape, kind)
            expected = slow.conv2d(x, *expected_weights, layer.bias, g, padding=padding_of(layer), **geometry)
            assert_close(gradients(layer, x.to(memory_format=memory_format), g), expected)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes_are_those_of_the_plain_layer(mode):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(slow.group_mask(layer.weight, 2, 4, 1))
    plain = gradients(layer, x, torch.ones_like(layer(x)))
    convert(layer, NMRule(2, 4))
    assert_close(gradients(layer, x, torch.ones_like(layer(x))), plain)


def test_a_convolution_takes_an_image_without_batch():
    layer = nn.Conv2d(4, 4, 3, dtype=torch.float64)
    convert(layer, NMRule(2, 4))
    image = torch.randn(4, 5, 5, dtype=torch.float64)
    assert torch.equal(layer(image), layer(image.unsqueeze(0))[0])


@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 8), lambda: nn.Conv2d(16, 8, 1)], ids=["linear", "conv"])
def test_the_backward_of_bdwp_is_not_the_gradient_of_the_forward_but_the_papers(make):
    layer = make().double()
    rule = NMRule(2, 4, backward="bidirectional")
    w_f, w_b = effective_weights(layer.weight, rule)
    convert(layer, rule)
    x = torch.randn((5, 16, 3, 3) if w_f.dim() == 4 else (5, 16), dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(layer(x))
    ours = torch.autograd.grad(layer(x), x, g)[0]

    def product(x, weight):
        return nn.functional.linear(x, weight) if weight.dim() == 2 else nn.functional.conv2d(x, weight)

    of_the_forward = torch.autograd.grad(product(x, w_f), x, g)[0]
    of_the_paper = torch.autograd.grad(product(x, w_b), x, g)[0]  # g @ W_b
    assert (ours - of_the_paper).abs().max() <= 1e-12
    assert (ours - of_the_forward).abs().max() > 0.1
    assert not torch.autograd.gradcheck(lambda x: layer(x), x, raise_exception=False)


@pytest.mark.parametrize("backward", ["dense", "transposable"])
def test_with_one_mask_the_input_gradient_is_that_of_the_forward(backward):
    layer = nn.Linear(8, 8, dtype=torch.float64)
    convert(layer, NMRule(2, 4, backward=backward))
    assert torch.autograd.gradcheck(layer, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


def test_the_dense_weight_gradient_reaches_pruned_weights_too():
    layer = nn.Linear(8, 4)
    convert(layer, NMRule(1, 4))
    layer(torch.rand(3, 8) + 1).sum().backward()
    assert (layer.weight.grad != 0).all()


def test_only_the_gradients_that_are_needed_are_made():
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4, backward="bidirectional"))
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert x.grad is not None
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(False)
    y = layer(torch.randn(3, 8))
    assert y.grad_fn.next_functions[0][0] is None
    y.sum().backward()
    assert layer.weight.grad is not None


def test_a_second_derivative_is_refused():
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4, backward="bidirectional"))
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding="valid"),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.ReLU(),
        nn.Linear(16, 8),
    )


def step(net, call, x):
    """Output and all gradients of one step."""
    net.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_compile_gives_one_graph_and_the_same_numbers(backward, autocast, cached):
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    convert(net, NMRule(2, 4, backward=backward))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        if cached:
            for _, layer in effective_layers(net):
                layer.refresh_(torch.bfloat16 if autocast else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            eager = step(net, net, x)
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert all(map(torch.equal, step(net, compiled, x), eager))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    convert(net, NMRule(2, 4, backward="bidirectional"))
    torch._dynamo.reset()
    for a, b in zip(step(net, torch.compile(net, fullgraph=True), x), step(net, net, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    net, x = small_net(), torch.randn(2, 3, 8, 8, requires_grad=True)
    convert(net, NMRule(2, 4, backward="bidirectional"))
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(net, net, x)
        recomputed = step(net, lambda x: checkpoint(net, x, use_reentrant=reentrant), x)
    assert all(map(torch.equal, plain, recomputed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_it_does_for_a_plain_layer_of_the_same_weights(dtype):
    plain, ours = small_net().to(dtype), small_net().to(dtype)
    rule = NMRule(2, 4)
    for layer in plain:
        if hasattr(layer, "weight") and rule.obstacle(layer) is None:
            layer.weight.data.mul_(slow.group_mask(layer.weight, 2, 4, 1))
    convert(ours, rule)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, actual = step(plain, plain, x), step(ours, ours, x)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert torch.equal(actual[0], expected[0])


def test_without_autocast_a_wrong_dtype_is_the_plain_layers_error():
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 8, dtype=torch.bfloat16))
