"""Each layer's backend is decided with a reason; sparse products are used only where they are faster."""

import pytest
import torch
from torch import nn

from sparsetrain.ops import NMRule, convert, cusparselt, effective_layers, policy, unconvert

REASON = cusparselt.probe()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Conv2d(32, 32, 1, stride=2),
        nn.Conv2d(32, 32, 1, groups=2),
        nn.Conv2d(32, 32, 1, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.Linear(24, 16),
    )


@pytest.fixture
def as_if_sparse(monkeypatch):
    """The probe says yes; on a CPU the operators multiply uncompressed."""
    monkeypatch.setattr(cusparselt, "probe", lambda dtype=torch.bfloat16, device=None: None)


def decide(module, backend, **options):
    return policy.choose(module, backend, tokens=64, dtype=torch.bfloat16, **options)


@pytest.mark.skipif(REASON is None, reason="there is a device with sparse kernels")
def test_without_sparse_kernels_auto_is_the_reference_with_the_reason_and_asking_is_an_error():
    module = net()
    convert(module, NMRule(2, 4))
    decisions = decide(module, "auto")
    assert {(decision.backend, decision.reason) for decision in decisions} == {("reference", REASON)}
    assert [decision.name for decision in decisions] == [name for name, _ in effective_layers(module)]
    with pytest.raises(RuntimeError, match=f"backend='cusparselt' cannot run here: {REASON}. Use backend='auto'"):
        decide(module, "cusparselt")
    assert {layer.backend for _, layer in effective_layers(module)} == {"reference"}


def test_layers_without_a_kernel_stay_on_the_reference_with_their_reason(as_if_sparse):
    module = net()
    convert(module, NMRule(2, 4))
    assert {decision.name: (decision.backend, decision.reason) for decision in decide(module, "cusparselt")} == {
        "0": ("reference", "a 3x3 kernel: unfolding costs more than 2:4 can gain"),
        "1": ("cusparselt", "asked for"),
        "2": ("reference", "grouped convolution"),
        "3": ("reference", "padding around a 1x1 kernel"),
        "6": ("reference", "2:4 kernels need sizes divisible by 16; the output has 24"),
        "7": ("reference", "2:4 kernels need sizes divisible by 16; the input has 24"),
    }
    assert [layer.backend for _, layer in effective_layers(module)] == ["reference", "cusparselt", *["reference"] * 4]


def test_patterns_that_are_not_two_of_four_stay_on_the_reference(as_if_sparse):
    module = nn.Linear(32, 32)
    convert(module, NMRule(4, 8))
    with pytest.raises(RuntimeError, match="4:8 is not a subset of 2:4"):
        decide(module, "cusparselt")


@pytest.mark.parametrize(("sparse_us", "backend"), [(90.0, "cusparselt"), (97.0, "reference"), (200.0, "reference")])
def test_auto_takes_sparse_only_if_it_is_more_than_five_percent_faster(as_if_sparse, monkeypatch, sparse_us, backend):
    monkeypatch.setattr(policy, "_time_us", lambda layer, tokens, dtype: (100.0, sparse_us))
    module = nn.Linear(32, 32)
    convert(module, NMRule(2, 4))
    (decision,) = decide(module, "auto")
    assert decision.backend == module.backend == backend
    assert f"{100 / sparse_us:.2f} times as fast as dense at 64 tokens" in decision.reason
    assert (decision.dense_us, decision.sparse_us) == (100.0, sparse_us)
    assert decide(module, "reference")[0].reason == "asked for"
    assert module.backend == "reference"


@pytest.mark.parametrize("backward", ["dense", "bidirectional", "transposable"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 16), lambda: nn.Conv2d(32, 16, 1, stride=(2, 1))])
def test_a_layer_on_sparse_kernels_computes_what_the_reference_does(as_if_sparse, backward, cached, make):
    module = make()
    x = torch.randn(*((2, 5, 32) if isinstance(module, nn.Linear) else (2, 32, 5, 4)), requires_grad=True)
    convert(module, NMRule(2, 4, backward=backward))

    def step():
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, retain_graph=True)
        y.float().square().sum().backward()
        return [y.detach().clone(), dx, module.weight.grad.clone(), module.bias.grad.clone()]

    expected = step()
    decide(module, "cusparselt")
    assert module.backend == "cusparselt"
    if cached:
        module.refresh_(torch.bfloat16)
        pointers = [tensor.data_ptr() for tensor in module._compressed]
        module.refresh_(torch.bfloat16)
        assert [tensor.data_ptr() for tensor in module._compressed] == pointers
    for a, b in zip(step(), expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    if isinstance(module, nn.Linear):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x).detach(), module(x).detach())
    unconvert(module)
    assert not {"backend", "_compressed"} & set(vars(module))


def test_wrong_arguments_are_refused():
    module = nn.Linear(8, 8)
    convert(module, NMRule(2, 4))
    with pytest.raises(ValueError, match="backend='cuda' is none of 'auto', 'reference', 'cusparselt'"):
        policy.choose(module, "cuda", tokens=8, dtype=torch.bfloat16)
    for tokens in (0, {"other": 8}):
        with pytest.raises(ValueError, match="tokens of layer '' are 0; they must be at least 1"):
            policy.choose(module, tokens=tokens, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_auto_times_real_layers_on_a_gpu():
    module = nn.Linear(4096, 4096, device="cuda")
    convert(module, NMRule(2, 4, backward="bidirectional"))
    (decision,) = policy.choose(module, "auto", tokens=8192, dtype=torch.bfloat16)
    assert decision.dense_us > 0
    assert decision.sparse_us > 0
    assert (decision.backend == "cusparselt") == (decision.dense_us / decision.sparse_us > policy.GAIN)
