"""On a GPU the definition gives the CPU's masks, and whole layers on sparse kernels are near their formulas."""

import math

import pytest
import torch
from ops import slow
from torch import nn

from sparsetrain.ops import NMRule, convert, cusparselt, effective_layers, policy, reference

REASON = cusparselt.probe()
DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan, 1e-5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (4, 8), (3, 7)])
def test_masks_of_the_definition_are_those_of_the_cpu(n, m, dtype):
    torch.manual_seed(0)
    for shape in ((12 * m, 8 * m), (4 * m, 2 * m, 3, 3)):
        rough = SPECIAL[torch.randint(len(SPECIAL), shape)]
        weight = torch.where(torch.rand(shape) < 0.5, rough, torch.randn(shape)).to(dtype)
        for axis in (0, 1):
            expected = reference.nm_mask(weight, n, m, axis)
            assert torch.equal(reference.nm_mask(weight.to(DEVICE), n, m, axis).cpu(), expected)
            if weight.dim() == 4:
                last = weight.to(DEVICE, memory_format=torch.channels_last)
                assert torch.equal(reference.nm_mask(last, n, m, axis).cpu(), expected)


def test_transposable_masks_are_those_of_the_cpu():
    torch.manual_seed(0)
    weight, rule = torch.randn(64, 96), NMRule(2, 4, backward="transposable")
    assert torch.equal(rule.mask(weight.to(DEVICE)).cpu(), rule.mask(weight))


def sparse(layer, rule, dtype):
    """The layer converted and on sparse kernels."""
    convert(layer, rule)
    policy.choose(layer, "cusparselt", tokens=8, dtype=dtype)
    assert layer.backend == "cusparselt"
    return layer


def step(layer, x, g, dtype):
    """The results y, dx, dW, db of one mixed-precision step."""
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE, dtype):
        y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], g.to(dtype))


@pytest.mark.parametrize("tokens", [8, 13])
@pytest.mark.parametrize("backward", ["dense", "bidirectional", "transposable"])
@pytest.mark.parametrize("dtype", cusparselt.DTYPES)
def test_layers_on_sparse_kernels_are_near_the_formulas_in_float64(dtype, backward, tokens):
    torch.manual_seed(0)
    rule = NMRule(2, 4, backward=backward)
    for kernel in ((), (1, 1)):
        layer = (nn.Conv2d(128, 64, 1) if kernel else nn.Linear(128, 64)).to(DEVICE)
        weight = layer.weight.detach().cpu()
        mask_f = rule.mask(weight)
        mask_b = slow.group_mask(weight, 2, 4, 0) if backward == "bidirectional" else mask_f
        sparse(layer, rule, dtype)
        x, g = torch.randn(tokens, 128), torch.randn(tokens, 64)
        # As in a product in 16 bits: operands are rounded, and sums are exact.
        rounded = [tensor.to(dtype).double() for tensor in (x, weight.flatten(1), layer.bias.detach().cpu(), g)]
        w_f, w_b = (rounded[1] * mask.flatten(1) for mask in (mask_f, mask_b))
        expected = slow.linear(rounded[0], w_f, w_b, rounded[2], rounded[3])
        if kernel:
            x, g = (tensor.t()[None, :, :, None] for tensor in (x, g))  # tokens are rows of an image
        for cached in (False, True):
            if cached:
                layer.refresh_(dtype)
            result = step(layer, x.to(DEVICE), g.to(DEVICE), dtype)
            for actual, exact in zip(result, expected, strict=True):
                actual = actual.cpu().double()
                if kernel and actual.dim() == 4 and actual.shape[2] == tokens:
                    actual = actual[0, :, :, 0].t()
                assert (actual.reshape(exact.shape) - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_compiled_layers_on_sparse_kernels_are_one_graph_and_give_the_same_numbers(cached):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).to(DEVICE)
    convert(net, NMRule(2, 4, backward="bidirectional"))
    policy.choose(net, "cusparselt", tokens=24, dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True)
    for _ in range(2):
        x = torch.randn(24, 128, device=DEVICE)
        if cached:
            for _, layer in effective_layers(net):
                layer.refresh_(torch.bfloat16)
        gradients = []
        for call in (net, compiled):
            net.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=True):
                y = call(x)
            y.float().square().sum().backward()
            gradients.append([y.detach().float(), *(parameter.grad.clone() for parameter in net.parameters())])
        for eager, fused in zip(*gradients, strict=True):
            assert (eager - fused).norm() <= 1e-2 * eager.norm()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
