import pytest
import torch
from torch import nn

from sparsetrain.selection import PlanRow, Selection, first_and_last


class Zoo(nn.Module):
    """One of every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.bag = nn.EmbeddingBag(6, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv1d, self.conv3d = nn.Conv1d(4, 4, 3), nn.Conv3d(2, 2, 3)
        self.up1, self.up2, self.up3 = (
            nn.ConvTranspose1d(2, 2, 2),
            nn.ConvTranspose2d(2, 2, 2),
            nn.ConvTranspose3d(2, 2, 2),
        )
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.one_channel = nn.Conv2d(1, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.batch_norm, self.layer_norm = nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.lstm = nn.LSTM(4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.layer_scale_weight = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 3).requires_grad_(False)


def pruned(module, **where):
    return [row.name for row in Selection(**where).plan(module) if row.pruned]


def reasons(module, **where):
    return {row.name: row.reason for row in Selection(**where).plan(module)}


def test_weights_of_linear_convolution_and_attention_layers_are_pruned_and_nothing_else():
    assert pruned(Zoo()) == [
        "stem.weight",
        "conv1d.weight",
        "conv3d.weight",
        "up1.weight",
        "up2.weight",
        "up3.weight",
        "grouped.weight",
        "one_channel.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "frozen.weight",
    ]


def test_the_plan_has_one_row_for_every_parameter_in_order_with_its_shape():
    zoo = Zoo()
    plan = Selection().plan(zoo)
    assert [(row.name, row.shape) for row in plan] == [(name, tuple(p.shape)) for name, p in zoo.named_parameters()]
    assert all(row.reason for row in plan)
    assert {row.reason for row in plan if row.pruned} == {"pruned"}


def test_the_plan_says_why_a_parameter_is_left_alone():
    why = reasons(Zoo(), exclude=("stem.*",))
    assert why["stem.weight"] == why["stem.bias"] == "excluded by 'stem.*'"
    assert why["frozen.bias"] == why["attention.in_proj_bias"] == why["batch_norm.bias"] == "bias"
    assert why["batch_norm.weight"] == "no maskable weight (BatchNorm2d)"
    assert why["layer_norm.weight"] == "no maskable weight (LayerNorm)"
    assert why["attention.bias_k"] == "no maskable weight (MultiheadAttention)"
    assert why["lstm.weight_ih_l0"] == "no maskable weight (LSTM)"
    assert why["class_token"] == why["layer_scale_weight"] == "no maskable weight (Zoo)"
    assert why["embed.weight"] == "tied to an embedding: name it in `include`"
    assert why["bag.weight"] == "embedding: name it in `include`"
    assert why["depthwise.weight"] == "depthwise convolution: name it in `include`"
    assert reasons(Zoo(), include=("stem.*",))["conv1d.weight"] == "not included"


@pytest.mark.parametrize("name", ["embed.weight", "bag.weight", "depthwise.weight"])
def test_embeddings_tied_heads_and_depthwise_convolutions_are_pruned_only_if_named_in_full(name):
    assert name not in pruned(Zoo(), include=("*", name[:-1] + "*"))
    assert name in pruned(Zoo(), include=("*", name))
    assert name not in pruned(Zoo(), include=("*", name), exclude=(name,))


def test_a_norm_or_bias_is_not_pruned_even_if_named_in_full():
    assert pruned(Zoo(), include=("batch_norm.weight", "stem.bias", "class_token", "stem.weight")) == ["stem.weight"]


def test_frozen_parameters_are_pruned_like_others():
    assert "frozen.weight" in pruned(Zoo())


def test_tied_linear_layers_are_one_parameter_under_the_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert pruned(model) == ["0.weight"]


def test_a_depthwise_transposed_convolution_and_one_with_a_multiplier_are_depthwise():
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=4), nn.Conv1d(3, 6, 2, groups=3), nn.Linear(2, 2))
    assert pruned(model) == ["2.weight"]


def test_a_subclass_of_a_layer_is_that_layer():
    class Standardised(nn.Conv2d):
        pass

    assert pruned(nn.Sequential(Standardised(3, 4, 1))) == ["0.weight"]


def body():
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("stem", "block", "neck", "head")})


def test_a_parameter_is_pruned_if_one_include_and_no_exclude_matches():
    assert pruned(body(), include=("*e*.weight",)) == ["stem.weight", "neck.weight", "head.weight"]
    assert pruned(body(), include=["stem.*", "block.*"], exclude=["*m.*"]) == ["block.weight"]


def test_first_and_last_leaves_out_stem_and_classifier():
    assert pruned(body(), exclude=first_and_last()) == ["block.weight", "neck.weight"]
    why = reasons(body(), exclude=first_and_last())
    assert (why["stem.weight"], why["head.weight"]) == ("excluded: first layer", "excluded: last layer")


def test_first_and_last_are_those_of_the_model_whatever_the_globs_choose():
    assert pruned(body(), include=("stem.*", "block.*", "neck.*"), exclude=first_and_last()) == [
        "block.weight",
        "neck.weight",
    ]
    assert pruned(body(), exclude=("stem.*", *first_and_last())) == ["block.weight", "neck.weight"]


@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error_with_near_names(side):
    with pytest.raises(ValueError, match=r"'block.wieght' matches no parameter. Near names: 'block.weight'"):
        Selection(**{side: ("block.wieght",)}).plan(body())
    with pytest.raises(ValueError, match=r"'zzz' matches no parameter. Near names: '"):
        Selection(**{side: ("zzz",)}).plan(body())


def test_globs_are_case_sensitive():
    with pytest.raises(ValueError, match=r"'Block.\*' matches no parameter"):
        Selection(include=("Block.*",)).plan(body())


@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_bare_string_is_an_error_that_shows_the_list(side):
    with pytest.raises(ValueError, match=rf"{side}='conv\.\*' is one string where a list .* Write \['conv\.\*'\]"):
        Selection(**{side: "conv.*"})


def test_lists_become_tuples_so_that_a_selection_is_a_value():
    assert Selection(include=["a"], exclude=["b"]) == Selection(("a",), ("b",))
    assert hash(Selection(["a"])) == hash(Selection(("a",)))


@pytest.mark.parametrize(
    ("model", "where", "reason"),
    [
        (nn.Sequential(nn.BatchNorm1d(3)), Selection(), r"bias; no maskable weight \(BatchNorm1d\)"),
        (nn.Embedding(3, 2), Selection(), "embedding: name it in `include`"),
        (nn.Sequential(nn.Linear(2, 2)), Selection(exclude=first_and_last()), "excluded: last layer"),
        (nn.Sequential(nn.Linear(2, 2)), Selection(exclude=("*",)), "excluded by"),
    ],
)
def test_nothing_to_prune_is_an_error_that_lists_the_reasons(model, where, reason):
    with pytest.raises(ValueError, match=rf"has nothing to prune with .*{reason}"):
        where.plan(model)


def test_a_module_without_parameters_has_nothing_to_prune():
    with pytest.raises(ValueError, match=r"ReLU has nothing to prune .*: it has no parameters"):
        Selection().plan(nn.ReLU())


def test_a_row_is_a_value():
    assert Selection().plan(nn.Linear(3, 2)) == (
        PlanRow("weight", (2, 3), True, "pruned"),
        PlanRow("bias", (2,), False, "bias"),
    )


def test_a_name_with_brackets_is_matched_as_it_stands():
    module = nn.ModuleDict({"fc[1]": nn.Linear(4, 4), "head": nn.Linear(4, 4)})

    def pruned(**settings):
        return [row.name for row in Selection(**settings).plan(module) if row.pruned]

    assert pruned(include=["fc[1].weight"]) == ["fc[1].weight"]
    assert pruned(exclude=["fc[1].weight"]) == ["head.weight"]
