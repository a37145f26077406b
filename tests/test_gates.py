import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.gates import Gates, InputGates, StaticGates, binarize, make_gates


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


def gate(net: nn.Module, hidden: int | None = 3, *, spread: bool = False) -> dict[str, Gates]:
    """Gates on inner channels, the block and hidden units; `spread`: open and closed ones, by input."""
    stream = torch.Generator().manual_seed(1)
    shapes = {"block.conv1": (6, -3), "block": (1, -3), "fc1": (5, -1)}
    dtype = net.fc1.weight.dtype
    gates = {
        name: make_gates(count, name=name, axis=axis, features=4, hidden=hidden, generator=stream).to(dtype)
        for name, (count, axis) in shapes.items()
    }
    gates["block.conv1"].attach_channels(net.block.conv1, net.block.conv2)
    gates["block"].attach_block(net.block)
    gates["fc1"].attach_channels(net.fc1, net.fc2)
    if spread:
        scatter(net, gates, stream)
    return gates


@torch.no_grad()
def scatter(net: nn.Module, gates: dict[str, Gates], stream: torch.Generator) -> None:
    for each in gates.values():
        if isinstance(each, StaticGates):
            each.free[::2] = 1.0 if each.count == 1 else -1.0
        else:
            each.down_bias.fill_(1.0)
            each.up.normal_(generator=stream)
    net(images().to(net.fc1.weight.dtype))
    for each in gates.values():
        if isinstance(each, InputGates):
            each.up_bias -= each.last_logits.median(0).values


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
    plain, gated = make_net(), make_net()
    gate(gated, hidden)
    for scale in (1, 1000):
        assert torch.equal(gated(images() * scale), plain(images() * scale))


@torch.no_grad()
def test_input_gates_are_the_network_of_their_formula_and_differ_among_samples():
    net, x = make_net(), images()
    every = gate(net, spread=True)
    net(x)
    gates = every["block.conv1"]
    found = gates.last_logits
    features = torch.relu(net.stem(x))
    for sample in range(len(x)):
        pooled = torch.stack([features[sample, channel].sum() / 16 for channel in range(4)])
        hidden = [max(float(row @ pooled + bias), 0.0) for row, bias in zip(gates.down, gates.down_bias, strict=True)]
        expected = [
            float(sum(w * h for w, h in zip(row, hidden, strict=True)) + bias)
            for row, bias in zip(gates.up, gates.up_bias, strict=True)
        ]
        assert found[sample].tolist() == pytest.approx(expected)
    for name, each in every.items():
        opened = (each.last_logits >= 0).double().mean(0)
        assert ((opened > 0) & (opened < 1)).any(), name


@pytest.mark.parametrize("hidden", [3, None])
def test_a_gated_network_computes_what_its_open_parts_do(hidden):
    plain, net, x = make_net(), make_net(), images()
    every = gate(net, hidden, spread=True)
    out = net(x)
    gates = {name: (each.last_logits >= 0).expand(len(x), -1) for name, each in every.items()}
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
    gates = make_gates(1, name="block", axis=-1, features=4, hidden=8)
    gates.attach_block(block)
    with torch.no_grad():
        gates.up.normal_()
        gates.up_bias.zero_()
    out = block(x)
    is_open = gates.last_logits[:, 0] >= 0
    assert 0 < is_open.sum() < 64
    assert torch.equal(out[is_open], expected[is_open])
    assert torch.equal(out[~is_open], x[~is_open])


def test_tokens_are_gated_at_their_last_axis_by_their_mean_over_positions():
    torch.manual_seed(0)
    mlp, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)), torch.randn(6, 5, 3)
    units = make_gates(4, name="0", axis=-1, features=3, hidden=2)
    units.attach_channels(mlp[0], mlp[2])
    skip = make_gates(1, name="mlp", axis=-1, features=3, hidden=2)
    skip.attach_block(mlp)
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


def test_closed_gates_get_a_gradient_of_the_task_though_a_relu_lies_before_the_reader():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    gates = make_gates(4, name="0", axis=-1, features=3, hidden=None)
    gates.attach_channels(net[0], net[2])
    nn.init.constant_(gates.free, -1.0)
    net(torch.randn(32, 3)).square().sum().backward()
    assert gates.free.grad.all()


@pytest.mark.parametrize("copy", [deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_a_copy_made_after_a_forward_pass_has_gates_of_its_own(copy):
    net, x = make_net(), images()
    gates = gate(net, spread=True)
    out = net(x)
    other = copy(net)
    assert torch.equal(other(x), out)
    for each in gates.values():
        nn.init.constant_(each.up_bias, 1e4)
    assert torch.equal(net(x), make_net()(x))
    assert torch.equal(other(x), out)


def test_without_its_gates_the_network_is_the_plain_one():
    plain, net = make_net(), make_net()
    gates = gate(net, spread=True)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert len([*net.parameters()]) == len([*plain.parameters()])
    net(images())
    for each in gates.values():
        each.detach()
    assert torch.equal(net(images()), plain(images()))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_initial_weights_come_from_the_given_generator_alone():
    net = make_net()
    state = torch.get_rng_state()
    one = gate(net)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    other = gate(make_net())
    assert torch.equal(one["fc1"].down, other["fc1"].down)


def test_gates_are_computed_in_full_precision_under_autocast():
    net, x = make_net().float(), images().float()
    every = gate(net, spread=True)
    features, gates = torch.relu(net.stem(x)), every["block"]
    expected = gates.logits(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gates.logits(features), expected)
        assert net(x).dtype == torch.bfloat16
    assert all(each.last_logits.dtype == torch.float32 for each in every.values())


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_output_gates_and_gradients():
    results = []
    for compiled in (False, True):
        net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))
        units = make_gates(4, name="0.0", axis=-1, features=3, hidden=16)
        units.attach_channels(net[0][0], net[0][2])
        skip = make_gates(1, name="0", axis=-1, features=3, hidden=16)
        skip.attach_block(net[0])
        torch.manual_seed(0)
        parameters = [*net.parameters(), *units.parameters(), *skip.parameters()]
        for parameter in parameters:
            nn.init.normal_(parameter)
        x = torch.randn(8, 3)
        torch.compiler.reset()
        out = (torch.compile(net, backend="aot_eager") if compiled else net)(x)
        means = [binarize(gates.last_logits).mean(0) for gates in (units, skip)]
        assert any(0 < mean < 1 for mean in torch.cat(means))
        (out.square().sum() + sum(mean.square().sum() for mean in means)).backward()
        results.append((out.detach(), [mean.detach() for mean in means], [p.grad for p in parameters]))
    torch.testing.assert_close(*results)


def gates_on(count: int, features: int, axis: int = -3) -> Gates:
    return make_gates(count, name="it", axis=axis, features=features, hidden=3).double()


@pytest.mark.parametrize(
    ("stride", "attach", "message"),
    [
        (2, lambda n: gates_on(1, 4).attach_block(n.block), r"'it' makes \(16, 4, 2, 2\) of \(16, 4, 4, 4\)"),
        (1, lambda n: gates_on(1, 5).attach_block(n.block), r"look at 5 features, but its input of shape .* 4 at"),
        (1, lambda n: gates_on(6, 4).attach_channels(n.block.conv1, n.fc1), r"6 gates of 'it' do not fit \(16, 4\)"),
        (1, lambda n: gates_on(5, 4, -1).attach_channels(n.fc1, n.block.bn1), r"has run without 'it' before it"),
        (1, lambda n: gates_on(1, 4).attach_block(n.fc1), r"'it' need a batch of tensors .* got \(16, 4\)"),
    ],
)
def test_what_the_forward_pass_shows_to_be_wrong_is_refused_with_the_layer(stride, attach, message):
    net = make_net(stride)
    attach(net)
    with pytest.raises(ValueError, match=message):
        net(images())


@pytest.mark.parametrize("steps", [5, 7], ids=["as many as gates", "others"])
@torch.no_grad()
def test_channels_are_multiplied_where_the_layer_that_reads_them_has_them(steps):
    layer, reader = nn.Linear(3, 5), nn.Conv1d(5, 2, 1)
    gates = make_gates(5, name="layer", axis=-1, features=3, hidden=None)
    gates.attach_channels(layer, reader)
    gates.free[1] = -1.0
    x = torch.randn(4, steps, 3)
    hidden = layer(x)
    made = reader(hidden.transpose(1, 2))
    gates.detach()
    hidden[..., 1] = 0
    torch.testing.assert_close(made, reader(hidden.transpose(1, 2)))


def test_a_run_without_gradients_in_training_leaves_the_logits_of_the_step():
    torch.manual_seed(0)
    layer, reader = nn.Linear(4, 3), nn.Linear(3, 2)
    gates = StaticGates(3, name="layer", axis=-1)
    gates.attach_channels(layer, reader)
    x = torch.randn(2, 4)
    reader(layer(x))
    before = gates.last_logits
    assert before.requires_grad
    with torch.no_grad():
        reader(layer(x))
    assert gates.last_logits is before
    layer.eval()
    with torch.no_grad():
        reader(layer(x))
    assert gates.last_logits is not before
