"""The registered operators pass opcheck and agree with the reference; those for a GPU are compared there."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ops import slow

from sparsetrain.ops import NMRule, autograd, cusparselt, library, reference

REASON = cusparselt.probe()
gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device, dtype):
    weight = torch.randn(32, 48, device=device)
    kernel = torch.randn(8, 8, 3, 3, device=device).to(memory_format=torch.channels_last)
    for op in (torch.ops.sparsetrain.prune, torch.ops.sparsetrain.prune_dual, torch.ops.sparsetrain.prune_transposable):
        torch.library.opcheck(op, (weight, 2, 4, dtype))
        torch.library.opcheck(op, (kernel, 2, 4, dtype))
    torch.library.opcheck(torch.ops.sparsetrain.prune_dual_t, (weight, 2, 4, dtype))
    if device == "cuda" and dtype not in cusparselt.DTYPES:
        return
    pruned = library.prune(weight, 2, 4, dtype)
    torch.library.opcheck(torch.ops.sparsetrain.compress, (pruned,))
    x = torch.randn(11, 48, device=device, dtype=dtype)
    for bias in (None, torch.randn(32, device=device, dtype=dtype)):
        torch.library.opcheck(torch.ops.sparsetrain.spmm, (library.compress(pruned), x, bias, 0))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
def test_the_transposed_operand_is_the_pruned_one_turned(n, m):
    weight = torch.randn(32, 48)
    forward, backward_t = library.prune_dual_t(weight, n, m, torch.float32)
    assert torch.equal(forward, weight * slow.group_mask(weight, n, m, 1))
    assert torch.equal(backward_t, (weight * slow.group_mask(weight, n, m, 0)).t())
    assert backward_t.is_contiguous()


def weights(device="cpu"):
    """Of a linear layer and of convolutions in both memory formats."""
    torch.manual_seed(0)
    found = [torch.randn(shape).to(device) for shape in ((16, 24), (8, 12, 3, 3), (8, 12, 3, 3))]
    return [*found[:2], found[2].to(memory_format=torch.channels_last)]


@pytest.mark.parametrize("reason", [None, "some"])
def test_the_kernels_are_used_wherever_there_is_no_obstacle(monkeypatch, reason):
    called = []

    def prune_(weight, n, m, forward, backward):
        called.append(("prune", tuple(weight.shape)))
        reference.prune_(weight, n, m, forward=forward, backward=backward)

    def add_decay_(grad, weight, n, m, decay):
        called.append(("decay", tuple(weight.shape)))
        reference.add_decay_(grad, weight, reference.nm_mask(weight, n, m), decay)

    stub = SimpleNamespace(prune_=prune_, add_decay_=add_decay_)
    stub.obstacle = stub.decay_obstacle = lambda *arguments, **settings: reason
    monkeypatch.setattr(library, "_kernels", lambda device: stub)
    monkeypatch.setattr(library, "_current", lambda tensor: nullcontext())
    for backward in ("dense", "bidirectional", "transposable"):
        rule = NMRule(2, 4, backward)
        for weight in weights():
            operands = [torch.empty_like(weight) for _ in range(1 if rule.one_mask else 2)]
            rule.write_(operands[0], operands[-1], weight)
            for operand, expected in zip(operands, rule.weights(weight), strict=False):
                assert torch.equal(operand, expected)
            grad = torch.zeros_like(weight)
            rule.add_decay_(grad, weight, 0.5)
            assert torch.equal(grad, 0.5 * (weight - operands[0]))
    # Transposable masks are found by enumeration.
    assert {name for name, _ in called} == ({"prune", "decay"} if reason is None else set())
    assert len(called) == (0 if reason else 2 * 3 * 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_gpu_weights_and_decay_are_those_of_the_cpu(dtype):
    for backward in ("dense", "bidirectional", "transposable"):
        rule = NMRule(2, 4, backward)
        for weight, there in zip(weights(), weights("cuda"), strict=True):
            for ours, theirs in zip(rule.weights(there, dtype), rule.weights(weight, dtype), strict=True):
                assert torch.equal(ours.cpu(), theirs)
            grad, expected = torch.ones_like(there), torch.ones_like(weight)
            rule.add_decay_(grad, there, 0.3)
            rule.add_decay_(expected, weight, 0.3)
            assert torch.equal(grad.cpu(), expected)


@pytest.mark.parametrize("sparse_backward", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_compressed_products_are_the_three_formulas(bias, sparse_backward):
    weight = torch.randn(16, 32, dtype=torch.float64, requires_grad=True)
    b = torch.randn(16, dtype=torch.float64, requires_grad=True) if bias else None
    forward, backward_t = library.prune_dual_t(weight.detach(), 2, 4, torch.float64)
    for leading in ((), (5,), (2, 3)):
        x = torch.randn(*leading, 32, dtype=torch.float64, requires_grad=True)
        g = torch.randn((), dtype=torch.float64).expand(*leading, 16)
        backward = library.compress(backward_t) if sparse_backward else backward_t.t()
        y = autograd.sparse_linear(x, weight, b, library.compress(forward), backward, sparse_backward=sparse_backward)
        wanted = [x, weight, b] if bias else [x, weight]
        actual = [y.detach(), *torch.autograd.grad(y, wanted, g)]
        expected = slow.linear(x.detach(), forward, backward_t.t(), b, g)
        for a, e in zip(actual, expected, strict=False):
            assert (a - e).abs().max() <= 1e-12


def test_which_patterns_are_two_of_four():
    assert all(cusparselt.holds(n, m) for n, m in [(2, 4), (1, 4), (2, 8), (1, 8), (2, 16), (1, 2)])
    assert not any(cusparselt.holds(n, m) for n, m in [(4, 8), (1, 3), (3, 4), (2, 6)])


def test_the_probe_says_why_it_cannot():
    assert "not in torch.float32" in cusparselt.probe(torch.float32)
    if not torch.cuda.is_available():
        assert cusparselt.probe() == "torch sees no CUDA device"
    assert cusparselt.obstacle(torch.Size((24, 32))) == "2:4 kernels need sizes divisible by 16; the output has 24"
    with pytest.raises(ValueError, match=r"contiguous matrix; got strides \(1, 16\)"):
        cusparselt.compress(torch.ones(32, 16).t())
    with pytest.raises(ValueError, match=r"cannot compress this weight: .*Use backend='reference'"):
        cusparselt.compress(torch.ones(32, 16))


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("dtype", cusparselt.DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 13, 1024, 1027])
def test_sparse_products_on_a_gpu_are_near_those_in_float64(tokens, dtype):
    for n, m in ((2, 4), (1, 4), (2, 8)):
        torch.manual_seed(0)
        weight, bias = torch.randn(256, 512, device="cuda", requires_grad=True), torch.randn(256, device="cuda")
        x = torch.randn(tokens, 512, device="cuda", dtype=dtype, requires_grad=True)
        forward, backward_t = library.prune_dual_t(weight.detach(), n, m, dtype)
        y = autograd.sparse_linear(
            x, weight, bias.to(dtype), library.compress(forward), library.compress(backward_t), sparse_backward=True
        )
        g = torch.randn(256, tokens, device="cuda", dtype=dtype).t()  # not contiguous
        dx, dw = torch.autograd.grad(y, [x, weight], g)
        cpu = weight.detach().cpu()
        mask_f, mask_b = slow.group_mask(cpu, n, m, 1), slow.group_mask(cpu, n, m, 0)
        assert torch.equal(forward.cpu(), (cpu * mask_f).to(dtype))
        assert torch.equal(backward_t.cpu().t(), (cpu * mask_b).to(dtype))
        expected = slow.linear(
            x.detach().cpu().double(), (cpu * mask_f).double(), (cpu * mask_b).double(), bias.cpu().double(),
            g.cpu().double(),
        )  # fmt: skip
        for actual, e in zip((y, dx, dw), expected, strict=False):
            assert (actual.detach().cpu().double() - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize(("tokens", "copied"), [(16, False), (13, True)])
def test_kernels_read_the_input_itself_unless_it_has_to_be_filled_up(monkeypatch, tokens, copied):
    read = []

    def multiply(compressed, x_t, **settings):
        read.append(x_t)
        return x_t.new_zeros(x_t.shape[1], len(compressed))

    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply, raising=False)
    x = torch.randn(tokens, 32, dtype=torch.bfloat16)
    y = cusparselt.matmul(x.new_zeros(16, 18), x, None)
    assert y.shape == (tokens, 16)
    assert read[0].shape == (32, 16)
    assert torch.equal(read[0][:, :tokens], x.t())
    assert (read[0].data_ptr() != x.data_ptr()) == copied


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("shape", [(64, 128), (16, 16), (16, 96), (80, 64), (64, 80), (112, 672), (96, 240)])
def test_the_identity_comes_back_from_a_compressed_weight(shape):
    pruned = library.prune(torch.randn(shape, device="cuda"), 2, 4, torch.bfloat16)
    pruned[0] = 0
    eye = torch.eye(shape[1], device="cuda", dtype=torch.bfloat16)
    assert torch.equal(library.spmm(library.compress(pruned), eye, None), pruned.t())
