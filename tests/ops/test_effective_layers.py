"""Conversion changes only the class of a layer, says why a layer stays dense, and is undone exactly."""

import copy
import io
import math
import pickle

import pytest
import torch
from ops import slow
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from sparsetrain.ops import (
    EffectiveConv2d,
    EffectiveLinear,
    NMRule,
    convert,
    effective_layers,
    fold,
    masks,
    unconvert,
)
from sparsetrain.ops.layers import make_effective
from sparsetrain.selection import Selection

BACKWARDS = ["dense", "bidirectional", "transposable"]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 10)
    )


def image(seed=0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def trace(module):
    """All that conversion might leave behind."""
    return [
        (name, type(layer), sorted(vars(layer)), {k: id(v) for k, v in layer._parameters.items()}, len(layer._buffers))
        for name, layer in module.named_modules()
    ]


def test_the_very_parameters_names_hooks_and_references_stay():
    module = net()
    layer, weight, calls = module[4], module[4].weight, []
    names = [name for name, _ in module.named_parameters()]
    layer.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    convert(module, NMRule(2, 4))
    assert module[4] is layer
    assert layer.weight is weight is optimizer.param_groups[0]["params"][4]
    assert isinstance(layer, EffectiveLinear)
    assert isinstance(layer, nn.Linear)
    assert isinstance(module[2], EffectiveConv2d)
    assert [name for name, _ in module.named_parameters()] == names == list(module.state_dict())
    module(image())
    assert calls == [1]


def test_an_input_may_be_given_by_its_name():
    module, x = net(), image()
    convert(module, NMRule(2, 4))
    hidden = module[1](module[0](x))
    assert torch.equal(module[2](input=hidden), module[2](hidden))
    flat = torch.randn(2, 32)
    assert torch.equal(module[4](input=flat), module[4](flat))


@pytest.mark.parametrize("undo", [unconvert, fold])
def test_undoing_leaves_no_trace(undo):
    module = net()
    before = trace(module)
    convert(module, NMRule(2, 4, backward="bidirectional"))
    for _, layer in effective_layers(module):
        layer.refresh_()
    module(image()).sum().backward()
    undo(module)
    assert trace(module) == before
    assert list(effective_layers(module)) == []
    convert(module, NMRule(1, 4))  # a second time is clean


def test_unconvert_keeps_the_dense_master():
    module = net()
    before = copy.deepcopy(module.state_dict())
    convert(module, NMRule(2, 4))
    unconvert(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("backward", BACKWARDS)
def test_the_folded_plain_model_computes_what_the_converted_one_did(backward):
    module, rule = net(), NMRule(2, 4, backward=backward)
    convert(module, rule)
    expected, kept = module(image()), masks(module)
    weights = {name: module.get_parameter(name).detach().clone() for name in kept}
    folded = fold(module)
    assert torch.equal(module(image()), expected)
    assert list(folded) == list(kept) == [f"{i}.weight" for i in ((2, 4, 5) if backward == "dense" else (2, 4))]
    for name, mask in folded.items():
        assert torch.equal(mask, kept[name])
        assert torch.equal(module.get_parameter(name), torch.where(mask, weights[name], 0))
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
        if backward != "transposable":
            assert torch.equal(mask, slow.group_mask(weights[name], 2, 4, 1))


class OwnLinear(nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(16, 12, 1, groups=2)
        self.good = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)
        self.odd = nn.Linear(18, 16)
        self.own = OwnLinear(16, 16)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.one = nn.Linear(16, 16)
        self.two = nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.embedding = nn.Embedding(16, 16)
        self.unembedding = nn.Linear(16, 16)
        self.unembedding.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(16, 2)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32)
        self.patched = nn.Linear(16, 16)
        self.patched.forward = lambda x: x
        self.transposed = nn.ConvTranspose2d(16, 16, 3)


def test_every_layer_that_stays_dense_has_its_reason():
    rows = {row.name: (row.pruned, row.reason) for row in convert(Model(), NMRule(2, 4, backward="bidirectional"))}
    expected = {
        "stem.weight": "3 input channels are not divisible by 4",
        "depthwise.weight": "depthwise convolution: name it in `include`",
        "grouped.weight": "6 output channels per group are not divisible by 4",
        "head.weight": "10 output channels are not divisible by 4",
        "odd.weight": "18 input channels are not divisible by 4",
        "own.weight": "OwnLinear is not exactly nn.Linear or nn.Conv2d",
        "one.weight": "tied: also called two.weight",
        "embedding.weight": "tied to an embedding: name it in `include`",
        "attention.in_proj_weight": "attention projection: nn.MultiheadAttention multiplies it without calling a layer",
        "attention.out_proj.weight": (
            "attention projection: nn.MultiheadAttention multiplies it without calling a layer"
        ),
        "encoder.linear1.weight": (
            "nn.TransformerEncoderLayer's fast path skips the layer: torch.backends.mha.set_fastpath_enabled(False)"
        ),
        "patched.weight": "its forward is replaced on the instance",
        "transposed.weight": "ConvTranspose2d is not exactly nn.Linear or nn.Conv2d",
        "good.bias": "bias",
    }
    assert {name: rows[name] for name in expected} == {name: (False, reason) for name, reason in expected.items()}
    assert not rows["normed.parametrizations.weight.original1"][0]
    assert [name for name, (converted, _) in rows.items() if converted] == ["good.weight"]
    assert rows["good.weight"][1] == "2:4 in both directions"


def test_a_named_depthwise_convolution_still_cannot_hold_the_pattern():
    module = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    rows = convert(module, NMRule(2, 4), where=Selection(include=("0.weight", "1.weight")))
    assert rows[0].reason == "depthwise convolution"


def test_an_encoder_layer_is_converted_and_used_once_its_fast_path_is_off():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        convert(layer, NMRule(2, 4))
        with torch.no_grad():
            sparse = layer(x)
            fold(layer)
            torch.testing.assert_close(layer(x), sparse)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_selection_chooses_by_parameter_name():
    module = net()
    rows = convert(module, NMRule(2, 4), where=Selection(exclude=("4.*",)))
    assert [name for name, _ in effective_layers(module)] == ["2", "5"]
    assert {row.name: row.reason for row in rows}["4.weight"] == "excluded by '4.*'"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert(nn.Linear(6, 4), NMRule(2, 4)), r"No layer of Linear can hold .*6 input channels"),
        (lambda: convert(net(), NMRule(2, 4), where=Selection(include=("nope",))), r"matches no parameter"),
        (lambda: [convert(module, NMRule(2, 4)) for module in [net()] * 2], r"'2' is converted already. Call fold"),
        (lambda: NMRule(2, 4, backward="both"), r"backward='both' is unknown. Choose one of 'dense', 'bidirectional'"),
        (lambda: NMRule(4, 8, backward="transposable"), r"Transposable 4:8 masks are found by enumeration"),
        (lambda: NMRule(5, 4), r"n=5 of m=4"),
        (lambda: NMRule(2, 4, backward="bidirectional").weights(torch.ones(4, 4), mask=torch.ones(4, 4)), r"two masks"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_failed_conversion_leaves_the_module_alone():
    module = nn.Sequential(nn.Linear(6, 6))
    before = trace(module)
    with pytest.raises(ValueError, match="can hold"):
        convert(module, NMRule(2, 4))
    assert trace(module) == before


@pytest.mark.parametrize("backward", BACKWARDS)
def test_the_cache_serves_until_it_is_refreshed_in_place_forgotten_or_seen_to_be_old(backward):
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    convert(layer, NMRule(2, 4, backward=backward))
    layer.refresh_()
    old, tensors = layer(x), layer.effective()
    pointers = [tensor.data_ptr() for tensor in tensors]
    layer.weight.data.copy_(torch.randn(8, 8))  # which leaves no sign
    assert torch.equal(layer(x), old)
    assert not layer.stale
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 8))
    assert layer.stale
    seen = layer(x)
    layer.refresh_()
    assert not layer.stale
    new = layer(x)
    assert torch.equal(new, seen)
    other = {"weight": torch.randn(8, 8), "bias": layer.bias.detach()}
    plain = nn.functional.linear(x, layer.rule.weights(other["weight"], torch.float32)[0], layer.bias)
    assert torch.equal(torch.func.functional_call(layer, other, (x,)), plain)
    assert torch.equal(layer(x), new)
    assert [tensor.data_ptr() for tensor in layer.effective()] == pointers
    assert (tensors[0] is tensors[1]) == (backward != "bidirectional")
    assert not torch.equal(new, old)
    layer.forget()
    assert layer.stale
    assert torch.equal(layer(x), new)
    assert all(torch.equal(a, b) for a, b in zip(layer.effective(), tensors, strict=True))


def test_loading_forgets_what_was_made_of_the_weights_before():
    layer, other, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(3, 8)
    convert(layer, NMRule(2, 4))
    layer.refresh_()
    layer.load_state_dict(other.state_dict())
    convert(other, NMRule(2, 4))
    assert torch.equal(layer(x), other(x))


def test_layers_made_plain_are_made_effective_again():
    module = net()
    convert(module, NMRule(2, 4))
    expected, layers = module(image()), unconvert(module)
    assert layers == (module[2], module[4], module[5])
    make_effective(layers, NMRule(2, 4))
    assert torch.equal(module(image()), expected)


def test_the_cache_is_used_only_for_its_own_dtype():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    convert(layer, NMRule(2, 4))
    fresh = layer(x)
    layer.refresh_(torch.bfloat16)
    assert torch.equal(layer(x), fresh)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.effective() is layer._cached
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("cached", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_decay_is_that_of_the_mask_with_and_without_a_cache(backward, cached):
    layer = nn.Linear(16, 12)
    convert(layer, NMRule(2, 4, backward))
    with torch.no_grad():
        layer.weight[:4, :8] = torch.tensor([0.0, -0.0, 0.0, 1e-9, math.inf, -1e-9, 0.0, 0.0])
        layer.weight[4:, 3::4] = 0.0
    if cached is not None:
        layer.refresh_(cached)
    grad = torch.randn(12, 16)
    grad[:4, :8] = 0.0  # so that the smallest decay would be seen
    layer.weight.grad = grad.clone()
    layer.add_decay_(0.25)
    assert torch.equal(layer.weight.grad, grad + 0.25 * layer.weight.detach().masked_fill(layer.mask, 0))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_the_decay_is_that_of_a_weight_written_since_the_cache_was_made(backward):
    layer = nn.Linear(16, 12)
    convert(layer, NMRule(2, 4, backward))
    layer.refresh_()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 16))
    layer.weight.grad = torch.zeros(12, 16)
    layer.add_decay_(0.25)
    assert torch.equal(layer.weight.grad, 0.25 * layer.weight.detach().masked_fill(layer.mask, 0))


def test_a_weight_that_is_replaced_makes_the_cache_stale_and_another_shape_a_new_one():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(3, 8)
    convert(layer, NMRule(2, 4))
    layer.refresh_()
    layer.weight = nn.Parameter(layer.weight.detach()[:4])
    assert layer.stale
    layer.refresh_()
    assert not layer.stale
    assert torch.equal(layer(x), nn.functional.linear(x, layer.rule.weights(layer.weight, torch.float32)[0]))


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_layer_that_is_parametrized_after_conversion_is_refused_by_fold_and_undone_alone(parametrize):
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4))
    parametrize(layer)
    layer.state_dict()
    with pytest.raises(ValueError, match="was parametrized after the layer had been converted to 2:4"):
        fold(layer)
    twin = copy.deepcopy(layer)
    unconvert(layer)
    assert not list(effective_layers(layer))
    assert [kind for kind, _ in effective_layers(twin)] == [""]
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


def test_a_lazy_layer_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape before .* Call Sequential with a batch before"):
        convert(nn.Sequential(nn.LazyLinear(8)), NMRule(2, 4))


def test_a_refresh_between_forward_and_backward_is_refused_by_autograd():
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4, backward="bidirectional"))
    layer.refresh_()
    y = layer(torch.randn(3, 8, requires_grad=True))
    layer.refresh_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_cache_made_in_inference_mode_serves_training():
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4, backward="bidirectional"))
    with torch.inference_mode():
        layer.refresh_()
        layer(torch.randn(3, 8))
    layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
    with torch.inference_mode():
        layer.refresh_()


def test_the_state_dict_holds_the_forward_weights_alone_and_loads_into_the_plain_model():
    module = net()
    convert(module, NMRule(2, 4))
    for _, layer in effective_layers(module):
        layer.refresh_()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    plain = net(1)
    plain.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(plain(image()), module(image()))
    fold(module)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same_and_are_independent(duplicate):
    module = net()
    convert(module, NMRule(2, 4, backward="bidirectional"))
    for _, layer in effective_layers(module):
        layer.refresh_()
    twin = duplicate(module)
    assert torch.equal(twin(image()), module(image()))
    before = module(image())
    for _, layer in effective_layers(twin):
        layer.weight.data.normal_()
        layer.refresh_()
    assert torch.equal(module(image()), before)
    fold(twin)
    assert len(list(effective_layers(module))) == 2


@pytest.mark.parametrize("backward", ["dense", "transposable"])
def test_a_held_mask_stays_while_the_weights_move(backward):
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    convert(layer, NMRule(2, 4, backward=backward))
    mask = layer.mask
    layer.hold_(mask)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 8))
    expected = nn.functional.linear(x, layer.weight * mask, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.refresh_()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.mask, mask)
    layer.hold_(None)
    assert torch.equal(layer.mask, layer.rule.mask(layer.weight))
    assert not torch.equal(layer.mask, mask)


def test_a_held_mask_must_fit():
    layer = nn.Linear(8, 8)
    convert(layer, NMRule(2, 4))
    with pytest.raises(ValueError, match=r"The mask is torch.float32 \(8, 8\); needed is torch.bool \(8, 8\)"):
        layer.hold_(torch.ones(8, 8))
    unconvert(layer)
    convert(layer, NMRule(2, 4, backward="bidirectional"))
    with pytest.raises(ValueError, match="two masks"):
        layer.hold_(torch.ones(8, 8, dtype=torch.bool))


def test_channels_last_is_kept():
    module = net().to(memory_format=torch.channels_last)
    convert(module, NMRule(2, 4, backward="bidirectional"))
    module[2].refresh_()
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in module[2].effective())
    x = image().to(memory_format=torch.channels_last)
    module(x).sum().backward()
    assert module[2].weight.grad is not None


def test_a_compiled_layer_within_activation_checkpointing_is_part_of_one_graph():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    module, x = Checkpointed(), torch.randn(3, 8, requires_grad=True)
    convert(module, NMRule(2, 4))
    torch.compiler.reset()
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, module(x))
