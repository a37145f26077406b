"""Each layer's backend is decided with a reason; sparse products are used only where they are faster."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.ops import NMRule, convert, cusparselt, effective_layers, policy, search, unconvert
from sparsetrain.ops.cusparselt import Algorithms

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
    message = f"backend='cusparselt' cannot run here: {REASON}. Use backend='auto' or 'reference'."
    for refused in (
        lambda: decide(module, "cusparselt"),
        lambda: policy.check_backend("cusparselt", torch.bfloat16, torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
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
    with pytest.raises(ValueError, match="4:8 is not a subset of 2:4"):
        decide(module, "cusparselt")


@pytest.mark.parametrize(("sparse_us", "backend"), [(90.0, "cusparselt"), (97.0, "reference"), (200.0, "reference")])
def test_auto_takes_sparse_only_if_it_is_more_than_five_percent_faster(as_if_sparse, monkeypatch, sparse_us, backend):
    monkeypatch.setattr(policy, "_time_us", lambda *_: (100.0, sparse_us))
    module = nn.Linear(32, 32)
    convert(module, NMRule(2, 4))
    (decision,) = decide(module, "auto")
    assert decision.backend == module.backend == backend
    assert f"{100 / sparse_us:.2f} times as fast as dense at 64 tokens" in decision.reason
    assert (decision.dense_us, decision.sparse_us) == (100.0, sparse_us)
    assert decide(module, "reference")[0].reason == "asked for"
    assert module.backend == "reference"


def test_a_layer_whose_kernels_fail_stays_on_the_reference_and_says_so(as_if_sparse, monkeypatch):
    def time_us(layer, tokens, *_):
        if layer.in_features == 48:
            raise RuntimeError("no kernel for this size")
        return 100.0, 50.0

    monkeypatch.setattr(policy, "_time_us", time_us)
    module = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    convert(module, NMRule(2, 4))
    decisions = decide(module, "auto")
    assert [decision.backend for decision in decisions] == ["cusparselt", "reference"]
    assert decisions[1].reason == "its 2:4 kernels failed at 64 tokens: no kernel for this size"


def test_layers_of_one_shape_and_tokens_are_timed_once_and_those_without_tokens_not_at_all(as_if_sparse, monkeypatch):
    timed = []

    def time_us(layer, tokens, *_):
        timed.append((tuple(layer.weight.shape), tokens))
        return 100.0, 50.0

    monkeypatch.setattr(policy, "_time_us", time_us)
    module = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)], nn.Linear(32, 16), nn.Linear(16, 24))
    convert(module, NMRule(2, 4))
    names = policy.to_time(module, "auto", torch.bfloat16)
    assert names == ("0", "1", "2", "3", "4")
    assert policy.to_time(module, "cusparselt", torch.bfloat16) == ()
    decisions = policy.choose(module, tokens={"0": 64, "1": 64, "2": 8, "4": 64}, dtype=torch.bfloat16)
    assert timed == [((32, 32), 64), ((32, 32), 8), ((16, 32), 64)]
    assert decisions[3].reason == "not called in the first step"
    assert [decision.backend for decision in decisions] == [*["cusparselt"] * 3, "reference", "cusparselt", "reference"]
    assert policy.describe(decisions).splitlines()[4:] == [
        "4: cusparselt (2.00 times as fast as dense at 64 tokens; 100.0 us dense, 50.0 us sparse)",
        "5: reference (2:4 kernels need sizes divisible by 16; the output has 24)",
    ]
    assert policy.describe(decide(module, "reference")) == "all 6 layers: reference (asked for)"


@pytest.mark.parametrize("rule", [NMRule(2, 4, backward="bidirectional"), NMRule(2, 32)])
def test_timing_multiplies_both_ways_and_leaves_the_random_stream_alone(monkeypatch, rule):
    def event_us(call):
        call()
        return 1.0

    monkeypatch.setattr(policy, "event_us", event_us)
    module = nn.Linear(32, 16)  # of which 16 outputs hold no group of 32
    convert(module, rule)
    before = torch.get_rng_state()
    assert policy._time_us(module, 8, torch.bfloat16, None) == (1.0, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "shape", "tokens"),
    [
        (lambda: nn.Linear(16, 32), (3, 5, 16), 15),
        (lambda: nn.Linear(16, 32), (16,), 1),
        (lambda: nn.Conv2d(16, 32, 1), (3, 16, 4, 6), 72),
        (lambda: nn.Conv2d(16, 32, 1, stride=(2, 4)), (3, 16, 5, 6), 18),
        (lambda: nn.Conv2d(16, 32, 1, stride=2), (16, 5, 6), 9),
    ],
)
def test_tokens_are_the_rows_of_what_a_layer_puts_out(make, shape, tokens):
    layer, x = make(), torch.randn(shape)
    convert(layer, NMRule(2, 4))
    assert policy.tokens_of(layer, x) == layer(x).numel() // 32 == tokens


def operands(layer):
    """What the kernels of a layer must multiply now, from its weight and its held mask."""
    weight, rule = layer.weight.detach(), layer.rule
    forward, backward = rule.weights(weight, torch.bfloat16, mask=layer._held)
    return [forward.flatten(1), backward.flatten(1).t() if rule.backward != "dense" else forward.flatten(1)]


@pytest.mark.parametrize("backward", ["dense", "bidirectional", "transposable"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 16), lambda: nn.Conv2d(32, 16, 1)])
def test_what_kernels_multiply_follows_refreshes_held_masks_loading_and_copies(as_if_sparse, make, backward):
    def used():
        """What the next products multiply, if they run in bfloat16; on a CPU it is not compressed."""
        return layer._compressed if layer._fresh else layer._compress(torch.bfloat16)

    def is_present():
        return all(torch.equal(a, b) for a, b in zip(used(), operands(layer), strict=True))

    layer = make()
    convert(layer, NMRule(2, 4, backward=backward))
    decide(layer, "cusparselt")
    assert layer.stale  # a choice forgets
    layer.refresh_(torch.bfloat16)
    first = layer._compressed
    layer.weight.data.normal_()
    assert not is_present()
    layer.refresh_(torch.bfloat16)
    assert is_present()
    assert layer._compressed is first  # in the same storage
    if backward != "bidirectional":
        layer.hold_(layer.mask)
        layer.weight.data.normal_()
        layer.refresh_(torch.bfloat16)
        assert is_present()
        held = used()[0].clone()
        layer.hold_(None)
        assert is_present()
        assert not torch.equal(used()[0] != 0, held != 0)
        layer.refresh_(torch.bfloat16)
    twin = copy.deepcopy(layer)
    twin.weight.data.normal_()
    assert twin.stale
    twin.refresh_(torch.bfloat16)
    assert is_present()
    assert twin.backend == "cusparselt"
    layer.load_state_dict(twin.state_dict())
    assert is_present()
    layer.refresh_(torch.bfloat16)
    assert is_present()
    unconvert(layer)
    assert vars(layer).keys() == vars(make()).keys()


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


@pytest.fixture
def found(monkeypatch):
    """The products for which algorithms are searched: 7 is the best one with a bias, else 5."""
    products = []

    def best_algorithm(product, cache):
        products.append(product)
        return 7 if product.bias else 5

    monkeypatch.setattr(search, "best_algorithm", best_algorithm)
    return products


@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
def test_with_a_cache_the_algorithms_of_both_products_are_searched_and_timed(
    as_if_sparse, monkeypatch, tmp_path, found, backend
):
    timed = []

    def time_us(layer, tokens, dtype, algorithms):
        timed.append(algorithms)
        return 100.0, 50.0

    monkeypatch.setattr(policy, "_time_us", time_us)
    module = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16))
    for backward, second in (("bidirectional", 5), ("dense", 0)):
        found.clear()
        timed.clear()
        convert(module, NMRule(2, 4, backward=backward))
        assert policy.to_time(module, backend, torch.bfloat16, searches=True) == ("0", "1", "2")
        decisions = decide(module, backend, cache=search.Cache(tmp_path / "algorithms.json"))
        expected = [Algorithms(64, 7, second), Algorithms(64, 5, second), Algorithms(64, 7, second)]
        assert [decision.algorithms for decision in decisions] == expected
        assert [layer.algorithms for layer in module] == expected
        both = [
            search.Product(16, 32, 64, bias=True),
            search.Product(32, 16, 64),
            search.Product(32, 16, 64),
            search.Product(16, 32, 64),
        ]
        assert found == (both if second else both[::2])
        assert timed == (expected[:2] if backend == "auto" else [])
        reason = "2.00 times as fast as dense at 64 tokens; 100.0 us dense, 50.0 us sparse"
        reason = reason if backend == "auto" else "asked for"
        assert str(decisions[1]) == f"1: cusparselt ({reason}; algorithms 5 and {second})"
        assert {decision.algorithms for decision in decide(module, backend)} == {None}
        assert {layer.algorithms for layer in module} == {None}
        unconvert(module)


@pytest.mark.parametrize("found", [None, Algorithms(64, 7, 5)])
def test_a_decision_is_restored_from_primitives(found):
    decision = policy.Decision("net.0", "cusparselt", "asked for", algorithms=found)
    state = json.loads(json.dumps(asdict(decision)))
    assert policy.Decision.from_state(state) == decision
    assert str(policy.Decision.from_state(state)) == str(decision)


def test_a_layer_whose_search_fails_stays_on_the_reference_and_says_so(as_if_sparse, monkeypatch, tmp_path):
    searched = []

    def best_algorithm(product, cache):
        searched.append(product)
        raise RuntimeError("The default algorithm failed")

    monkeypatch.setattr(search, "best_algorithm", best_algorithm)
    module = nn.Sequential(nn.Linear(32, 16), nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)))
    convert(module, NMRule(2, 4))
    decisions = decide(module, "auto", cache=search.Cache(tmp_path / "algorithms.json"))
    assert {decision.reason for decision in decisions} == {
        "its 2:4 kernels failed at 64 tokens: The default algorithm failed"
    }
    assert [decision.name for decision in decisions] == ["0", "1.0", "1.1"]
    assert len(searched) == 2  # once for each shape


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 16), lambda: nn.Conv2d(32, 16, 1)])
def test_a_layer_runs_with_its_algorithms_for_just_so_many_tokens(as_if_sparse, make, compiled):
    used = []

    module = make()
    convert(module, NMRule(2, 4, backward="bidirectional"))
    decide(module, "cusparselt")
    module.algorithms = Algorithms(6, 3, 4)
    spmm = torch.ops.sparsetrain.spmm.default

    class Used(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is spmm:
                used.append((len(args[1]), args[3] if len(args) > 3 else 0))
            return func(*args, **(kwargs or {}))

    torch._dynamo.reset()
    run = torch.compile(module, backend="aot_eager", dynamic=False) if compiled else module
    for tokens in (6, 8):
        used.clear()
        x = torch.randn(tokens, 32, *([1, 1] if isinstance(module, nn.Conv2d) else []), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)  # compiles outside of the mode
            with Used():
                y = run(x)
                y.sum().backward()
        assert used == [(6, 3), (6, 4)] if tokens == 6 else [(8, 0), (8, 0)]


def test_wrong_arguments_are_refused():
    module = nn.Linear(8, 8)
    convert(module, NMRule(2, 4))
    with pytest.raises(
        ValueError, match=r"backend='cuda' is unknown\. Choose one of 'auto', 'reference', 'cusparselt'"
    ):
        policy.choose(module, "cuda", tokens=8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="tokens are 0; they must be at least 1"):
        policy.choose(module, tokens=0, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_auto_times_real_layers_on_a_gpu():
    module = nn.Linear(4096, 4096, device="cuda")
    convert(module, NMRule(2, 4, backward="bidirectional"))
    (decision,) = policy.choose(module, "auto", tokens=8192, dtype=torch.bfloat16)
    assert decision.dense_us > 0
    assert decision.sparse_us > 0
    assert (decision.backend == "cusparselt") == (decision.dense_us / decision.sparse_us > policy.GAIN)
