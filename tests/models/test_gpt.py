import math

import pytest
import torch
import torch.nn.functional as F

from sparsetrain import ops
from sparsetrain.models import GPT
from sparsetrain.selection import Selection

RULE = ops.NMRule(2, 4, backward="bidirectional")


def tiny(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(**{"vocabulary": 24, "context": 8, "layers": 2, "width": 16, "heads": 2, **options})


def test_gpt2_small_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = GPT(50_257, 1_024)
        bytewise = GPT(256, 256)
    assert sum(p.numel() for p in network.parameters()) == 124_439_808
    assert sum(p.numel() for p in bytewise.parameters()) == 85_449_216


@pytest.mark.parametrize("tied", [True, False])
def test_the_number_of_parameters_follows_the_formula_of_the_docstring(tied):
    symbols, context, width, layers = 24, 8, 16, 2
    expected = 12 * width**2 * layers + 13 * width * layers + (symbols + context) * width + 2 * width
    expected += 0 if tied else symbols * width
    assert sum(p.numel() for p in tiny(tied=tied).parameters()) == expected


def reference(network: GPT, tokens: list[int]) -> torch.Tensor:
    """Logits [time, V] from the formulas, token by token and head by head."""
    w = {name: value.double() for name, value in network.state_dict().items()}
    heads, width = network.blocks[0].attn.heads, w["embed.weight"].shape[1]
    size = width // heads

    def norm(x, name):
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    hidden = [w["embed.weight"][token] + w["position.weight"][place] for place, token in enumerate(tokens)]
    for block in (f"blocks.{index}" for index in range(len(network.blocks))):
        q, k, v = zip(*(linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3) for x in hidden), strict=True)
        for place, x in enumerate(list(hidden)):
            mixed = []
            for head in (slice(first, first + size) for first in range(0, width, size)):
                score = torch.stack([q[place][head] @ k[past][head] / math.sqrt(size) for past in range(place + 1)])
                share = score.exp() / score.exp().sum()
                mixed.append(sum(share[past] * v[past][head] for past in range(place + 1)))
            x = x + linear(torch.cat(mixed), f"{block}.attn.proj")
            inner = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            hidden[place] = x + linear(inner, f"{block}.mlp.fc2")
    return torch.stack([w["head.weight"] @ norm(x, "norm") for x in hidden])


@torch.no_grad()
def test_logits_are_those_of_the_formulas():
    network = tiny(tied=False).double()
    for parameter in network.parameters():
        parameter.normal_(std=0.3)  # norms and biases as well
    tokens = torch.randint(24, (2, 7))
    expected = torch.stack([reference(network, row) for row in tokens.tolist()])
    torch.testing.assert_close(network(tokens), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_token_changes_its_own_logits_and_later_ones_but_none_before():
    network, tokens = tiny(), torch.randint(24, (1, 8))
    before = network(tokens)
    for place in range(8):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % 24
        after = network(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=0)
        assert all((after[0, later] - before[0, later]).abs().max() > 1e-4 for later in range(place, 8))


@torch.no_grad()
def test_a_new_network_knows_nothing_and_is_drawn_as_gpt2_is():
    network = GPT(64, 32, layers=8, width=128, heads=4)
    tokens = torch.randint(64, (8, 33))
    loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(math.log(64), abs=0.1)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name
        else:
            ends = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            assert float(parameter.std()) == pytest.approx(0.02 / (4 if ends else 1), rel=0.05), name


def test_dropout_acts_in_training_alone():
    network, tokens = tiny(dropout=0.5), torch.randint(24, (2, 8))
    assert not torch.equal(network(tokens), network(tokens))
    assert torch.equal(network.eval()(tokens), network(tokens))
    torch.testing.assert_close(network(tokens), tiny().eval()(tokens))


def test_attention_and_feed_forward_layers_run_n_m_and_the_plan_says_why_no_others_do():
    plan = {row.name: row for row in ops.convert(tiny(), RULE)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    converted = {f"blocks.{index}.{layer}.weight" for index in (0, 1) for layer in layers}
    assert {name for name, row in plan.items() if row.pruned} == converted
    assert plan["embed.weight"].reason == "tied to an embedding: name it in `include`"
    assert plan["position.weight"].reason == "embedding: name it in `include`"
    assert plan["norm.weight"].reason == "no maskable weight (LayerNorm)"
    assert plan["blocks.0.attn.qkv.bias"].reason == "bias"


def test_a_head_of_its_own_runs_n_m_if_its_symbols_divide_and_a_tied_one_never_does():
    named = Selection(include=("*", "embed.weight"))
    assert {row.name: row for row in ops.convert(tiny(tied=False), RULE)}["head.weight"].pruned
    odd = {row.name: row for row in ops.convert(tiny(tied=False, vocabulary=65), RULE)}
    assert odd["head.weight"].reason == "65 output channels are not divisible by 4"
    tied = {row.name: row for row in ops.convert(tiny(), RULE, where=named)}
    assert not tied["embed.weight"].pruned
    assert tied["embed.weight"].reason.startswith("Embedding is not exactly nn.Linear")


def test_n_m_layers_compute_what_the_folded_network_does():
    network, tokens = tiny(), torch.randint(24, (2, 8))
    dense = network(tokens)
    ops.convert(network, RULE)
    sparse = network(tokens)
    masks = ops.fold(network)
    assert all(int(mask.sum()) * 2 == mask.numel() for mask in masks.values())
    torch.testing.assert_close(network(tokens), sparse)
    assert not torch.allclose(sparse, dense)


@pytest.mark.parametrize(
    "arguments",
    [{"vocabulary": 1}, {"context": 0}, {"layers": 0}, {"heads": 3}, {"width": 0}, {"dropout": 1.0}, {"heads": 0}],
)
def test_sizes_that_make_no_network_are_refused(arguments):
    with pytest.raises(ValueError, match="width a multiple of heads"):
        tiny(**arguments)


def test_more_tokens_than_the_context_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="9 tokens are more than the context of 8"):
        tiny()(torch.zeros(1, 9, dtype=torch.int64))
