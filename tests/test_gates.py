import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.gates import (
    InputGates,
    StaticGates,
    binarize,
    gates_of,
    last_logits,
    unwrap,
    wrap_block,
    wrap_channels,
)
from sparsetrain.selection import Selection


class Residual(nn.Module):
    """relu(x + f(x)), f of two convolutions with BatchNorm."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 6, 3, padding=1, stride=stride), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, width, 3, padding=1), nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x[..., :: self.stride, :: self.stride] + self.bn2(self.conv2(hidden)))


class Net(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block = Residual(4, stride)
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem(x)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


def make_net(stride: int = 1) -> Net:
    torch.manual_seed(0)
    net = Net(stride).double()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                for values in (part.weight, part.bias, part.running_mean):
                    values.normal_()
    return net.eval()


def gate(net: nn.Module, hidden: int | None = 3, *, spread: bool = False) -> nn.Module:
    """Gates on inner channels, the block and hidden units; `spread`: open and closed ones, by input."""
    stream = torch.Generator().manual_seed(1)
    choices = {"hidden": hidden, "generator": stream}
    wrap_channels(net, "block.conv1", before="block.conv2", **choices)
    wrap_block(net, "block", features=4, axis=-3, **choices)
    wrap_channels(net, "fc1", before="fc2", **choices)
    if spread:
        scatter(net, stream)
    return net


@torch.no_grad()
def scatter(net: nn.Module, stream: torch.Generator) -> None:
    for gates in gates_of(net).values():
        if isinstance(gates, StaticGates):
            gates.free[::2] = 1.0 if gates.count == 1 else -1.0
        else:
            gates.down_bias.fill_(1.0)
            gates.up.normal_(generator=stream)
    net(images().to(net.fc1.weight.dtype))
    for gates in gates_of(net).values():
        if isinstance(gates, InputGates):
            gates.up_bias -= gates.last_logits.median(0).values


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gates_are_exactly_0_and_1_with_the_gradient_of_the_sigmoid(dtype):
    logits = torch.linspace(-6, 6, 1001).to(dtype).requires_grad_()
    gates = binarize(logits)
    soft = torch.sigmoid(logits.detach())
    assert torch.equal(gates, (logits >= 0).to(dtype))
    assert not torch.equal((logits >= 0) + soft - soft, gates)  # the naive order rounds
    gates.sum().backward()
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


@pytest.mark.parametrize("hidden", [3, None])
def test_gates_begin_open_whatever_the_input_and_change_nothing(hidden):
    plain = make_net()
    gated = gate(deepcopy(plain), hidden)
    for scale in (1, 1000):
        assert torch.equal(gated(images() * scale), plain(images() * scale))


@torch.no_grad()
def test_input_gates_are_the_network_of_their_formula_and_differ_among_samples():
    net, x = gate(make_net(), spread=True), images()
    net(x)
    found, gates = last_logits(net)["block.conv1"], gates_of(net)["block.conv1"]
    features = torch.relu(net.stem(x))
    for sample in range(len(x)):
        pooled = torch.stack([features[sample, channel].sum() / 16 for channel in range(4)])
        hidden = [max(float(row @ pooled + bias), 0.0) for row, bias in zip(gates.down, gates.down_bias, strict=True)]
        expected = [
            float(sum(w * h for w, h in zip(row, hidden, strict=True)) + bias)
            for row, bias in zip(gates.up, gates.up_bias, strict=True)
        ]
        assert found[sample].tolist() == pytest.approx(expected)
    for name, logits in last_logits(net).items():
        opened = (logits >= 0).double().mean(0)
        assert ((opened > 0) & (opened < 1)).any(), name


@pytest.mark.parametrize("hidden", [3, None])
def test_a_gated_network_computes_what_its_open_parts_do(hidden):
    plain = make_net()
    net, x = gate(deepcopy(plain), hidden, spread=True), images()
    out = net(x)
    gates = {name: (logits >= 0).expand(len(x), -1) for name, logits in last_logits(net).items()}
    assert all((~mask).any() and mask.any() for mask in gates.values() if hidden or mask.shape[1] > 1)
    for sample in range(len(x)):
        pixels = torch.relu(plain.stem(x[sample : sample + 1]))
        if gates["block"][sample]:
            inner, kept = plain.block, gates["block.conv1"][sample]
            hidden_pixels = torch.relu(inner.bn1(inner.conv1(pixels)))[:, kept]
            branch = nn.functional.conv2d(hidden_pixels, inner.conv2.weight[:, kept], inner.conv2.bias, padding=1)
            pixels = torch.relu(pixels + inner.bn2(branch))
        units = gates["fc1"][sample]
        smaller = nn.functional.linear(pixels.mean((2, 3)), plain.fc1.weight[units], plain.fc1.bias[units])
        expected = nn.functional.linear(torch.relu(smaller), plain.fc2.weight[:, units], plain.fc2.bias)
        torch.testing.assert_close(out[sample : sample + 1], expected, rtol=1e-9, atol=1e-9)


def test_a_closed_block_returns_its_input_and_an_open_one_its_output_bit_for_bit():
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 100 * torch.randn(64, 4)
    expected = block(x)
    assert not torch.equal(x + (expected - x), expected)  # the naive blend rounds
    gates = wrap_block(nn.ModuleDict({"block": block}), "block", features=4, axis=-1, hidden=8)
    with torch.no_grad():
        gates.up.normal_()
        gates.up_bias.zero_()
    out = block(x)
    is_open = gates.last_logits[:, 0] >= 0
    assert 0 < is_open.sum() < 64
    assert torch.equal(out[is_open], expected[is_open])
    assert torch.equal(out[~is_open], x[~is_open])


def test_a_block_that_is_a_sequential_keeps_its_parts():
    class Skip(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    net, x = nn.Sequential(Skip(nn.Linear(3, 3), nn.ReLU()), Skip(nn.Linear(3, 3))), torch.randn(2, 3)
    expected = net(x)
    for name in ("0", "1"):
        wrap_block(net, name, features=3, axis=-1)
    assert torch.equal(net(x), expected)
    assert [len(part) for part in net] == [2, 1]
    assert gates_of(net).keys() == last_logits(net).keys() == {"0", "1"}


def test_tokens_are_gated_at_their_last_axis_by_their_mean_over_positions():
    torch.manual_seed(0)
    mlp, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)), torch.randn(6, 5, 3)
    units = wrap_channels(mlp, "0", hidden=2)
    skip = wrap_block(nn.ModuleDict({"mlp": mlp}), "mlp", features=3, axis=-1, hidden=2)
    with torch.no_grad():
        units.up.normal_()
        units.up_bias.zero_()
    out = mlp(x)
    assert skip.last_logits.shape == (6, 1)
    pooled = torch.stack([x[:, token] for token in range(5)]).sum(0) / 5
    torch.testing.assert_close(units.logits(pooled), units.last_logits)
    gates = (units.last_logits >= 0).float()
    hidden = nn.functional.linear(x, mlp[0].weight, mlp[0].bias) * gates[:, None, :]
    expected = nn.functional.linear(nn.functional.gelu(hidden), mlp[2].weight, mlp[2].bias)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("hidden", [3, None])
def test_the_state_dict_is_that_of_the_plain_network_and_any_optimizer_trains_the_gates(hidden):
    plain = make_net()
    net = gate(deepcopy(plain), hidden, spread=True)
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(make_net().state_dict())
    before = {name: value.clone() for name, value in net.named_parameters() if "gates_of" in name}
    assert len(before) == (3 if hidden is None else 12)
    net(images()).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for name, value in net.named_parameters():
        assert name not in before or not torch.equal(value, before[name]), name


def test_closed_gates_get_a_gradient_of_the_task_where_they_lie_behind_the_relu():
    torch.manual_seed(0)
    grads = {}
    for place in ("before", "after"):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        gates = wrap_channels(net, "0", hidden=None, **{"before": {"before": "2"}, "after": {}}[place])
        nn.init.constant_(gates.free, -1.0)
        net(torch.randn(32, 3)).square().sum().backward()
        grads[place] = gates.free.grad
    assert grads["before"].all()
    assert not grads["after"].any()


@pytest.mark.parametrize("copy", [deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_a_copy_made_after_a_forward_pass_has_gates_of_its_own(copy):
    net, x = gate(make_net(), spread=True), images()
    out = net(x)
    other = copy(net)
    assert all(gates.last_logits is None for gates in gates_of(other).values())
    assert torch.equal(other(x), out)
    for gates in gates_of(other).values():
        nn.init.constant_(gates.up_bias, 1e4)
    assert torch.equal(other(x), make_net()(x))
    assert torch.equal(net(x), out)
    unwrap(other)
    assert torch.equal(other(x), make_net()(x))
    assert torch.equal(net(x), out)


def test_unwrapping_leaves_the_plain_network_and_returns_the_gates():
    plain = make_net()
    net = gate(deepcopy(plain), spread=True)
    net(images())
    assert sorted(unwrap(net)) == ["block", "block.conv1", "fc1"]
    assert torch.equal(net(images()), plain(images()))
    for part, other in zip(net.modules(), plain.modules(), strict=True):
        assert vars(part).keys() == vars(other).keys()
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert part._modules.keys() == other._modules.keys()
    assert unwrap(net) == {}
    gate(net)  # again


def test_selections_do_not_prune_the_gates_own_network():
    chosen = [row.name for row in Selection().plan(gate(make_net())) if row.pruned]
    assert chosen == [row.name for row in Selection().plan(make_net()) if row.pruned]


def test_initial_weights_come_from_the_given_generator_alone():
    one, other = make_net(), make_net()
    state = torch.get_rng_state()
    gate(one)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    gate(other)
    assert torch.equal(gates_of(one)["fc1"].down, gates_of(other)["fc1"].down)


def test_gates_are_computed_in_full_precision_under_autocast():
    net, x = gate(make_net().float(), spread=True), images().float()
    features, gates = torch.relu(net.stem(x)), gates_of(net)["block"]
    expected = gates.logits(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gates.logits(features), expected)
        assert net(x).dtype == torch.bfloat16
    assert all(logits.dtype == torch.float32 for logits in last_logits(net).values())


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_output_gates_and_gradients():
    results = []
    for compiled in (False, True):
        net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))
        wrap_channels(net, "0.0", before="0.2", generator=torch.Generator().manual_seed(0))
        wrap_block(net, "0", features=3, axis=-1, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(8, 3)
        torch.compiler.reset()
        out = (torch.compile(net, backend="aot_eager") if compiled else net)(x)
        means = [binarize(logits).mean(0) for logits in last_logits(net).values()]
        assert any(0 < mean < 1 for mean in torch.cat(means))
        (out.square().sum() + sum(mean.square().sum() for mean in means)).backward()
        results.append((out.detach(), [mean.detach() for mean in means], [p.grad for p in net.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda net: wrap_channels(net, "block.conv3"), r"No module is called 'block.conv3'. Near names: 'block.conv"),
        (lambda net: wrap_channels(net, "block.bn1"), r"'block.bn1' is BatchNorm2d; gated are channels of conv"),
        (lambda net: wrap_channels(gate(net), "fc1"), r"'fc1' has gates already\. Call unwrap"),
        (lambda net: wrap_channels(net, "fc1", after="fc2", before="fc2"), r"'fc1' multiply once: give after='fc2' or"),
        (lambda net: wrap_channels(net, "fc1", hidden=0), r"hidden=0 must be at least 1, or None"),
        (lambda net: wrap_channels(net, "fc1", open_logit=0.0), r"open_logit=0\.0 would let the gates begin closed"),
        (lambda net: wrap_block(net, "block", features=4, axis=1), r"axis=1 is not counted from the end\. Give -3"),
        (lambda net: wrap_channels(nn.Sequential(nn.Linear(2, 1)), "0"), r"'0' has one output, which cannot be left"),
        (lambda net: wrap_block(nn.Sequential(nn.ReLU()), "0", features=4, axis=-3), r"'0' has no parameters"),
    ],
)
def test_what_cannot_be_gated_is_refused_with_the_remedy(wrap, message):
    with pytest.raises(ValueError, match=message):
        wrap(make_net())


@pytest.mark.parametrize(
    ("stride", "wrap", "message"),
    [
        (2, lambda n: wrap_block(n, "block", features=4, axis=-3), r"'block' makes \(16, 4, 2, 2\) of \(16, 4, 4, 4\)"),
        (
            1,
            lambda n: wrap_block(n, "block", features=5, axis=-3),
            r"look at 5 features, but its input of shape .* 4 at",
        ),
        (
            1,
            lambda n: wrap_channels(n, "block.conv1", after="fc1"),
            r"6 gates of 'block.conv1' do not fit a tensor of shape",
        ),
        (1, lambda n: wrap_channels(n, "fc1", after="block.bn1"), r"has run without 'fc1' before it"),
        (1, lambda n: wrap_block(n, "fc1", features=4, axis=-3), r"'fc1' need a batch of tensors .* got \(16, 4\)"),
    ],
)
def test_what_the_forward_pass_shows_to_be_wrong_is_refused_with_the_layer(stride, wrap, message):
    net = make_net(stride)
    wrap(net)
    with pytest.raises(ValueError, match=message):
        net(images())


def test_gates_that_have_seen_no_batch_are_named():
    with pytest.raises(ValueError, match=r"The gates of 'block.conv1' have seen no batch"):
        last_logits(gate(make_net()))
