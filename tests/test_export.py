"""The checker says which layers hold N:M and why the others do not; compressed models compute what dense ones do."""

import copy
import math

import pytest
import torch
from ops import slow
from torch import nn

from sparsetrain.export import check_nm, nm, to_semi_structured
from sparsetrain.ops import NMRule, convert, cusparselt, fold, unconvert

REASON = cusparselt.probe()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 10)
    )


def reasons(model, *arguments, **options):
    return {row.name: row.reason for row in check_nm(model, *arguments, **options)}


def test_a_folded_model_holds_the_pattern_and_its_dense_master_does_not():
    model = net()
    convert(model, NMRule(2, 4))
    master = "holds the dense master of effective weights; call ops.fold first"
    stem = "3 input channels are not divisible by 4"
    assert reasons(model) == {"0.weight": stem, "1.weight": master, "3.weight": master, "4.weight": master}
    dense = copy.deepcopy(model)
    unconvert(dense)
    assert reasons(dense)["3.weight"] == "128 of 128 groups have more than 2 of 4 weights"
    fold(model)
    assert reasons(model) == {"0.weight": stem, "1.weight": "", "3.weight": "", "4.weight": ""}
    assert [row.accepted for row in check_nm(model)] == [False, True, True, True]
    assert reasons(model, 1, 4)["3.weight"] == "128 of 128 groups have more than 1 of 4 weights"


@pytest.mark.parametrize("axis", ["input", "output"])
def test_groups_run_along_one_dimension_at_a_fixed_kernel_position(axis):
    dim = {"input": 1, "output": 0}[axis]
    for layer in (nn.Linear(8, 8), nn.Conv2d(8, 16, (2, 3)), nn.Conv1d(8, 8, 2)):
        with torch.no_grad():
            layer.weight.mul_(slow.group_mask(layer.weight, 2, 4, dim))
        assert reasons(layer, axis=axis) == {"weight": ""}
        other = {0: "input", 1: "output"}[dim]
        assert "groups have more than 2 of 4 weights" in reasons(layer, axis=other)["weight"]


def test_one_weight_too_many_is_seen_also_if_it_is_nan():
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.mul_(slow.group_mask(layer.weight, 2, 4, 1))
        layer.weight[2, 4:] = torch.tensor([1.0, -0.0, 1.0, math.nan])
    assert reasons(layer) == {"weight": "1 of 8 groups have more than 2 of 4 weights"}


def test_groups_of_the_output_do_not_cross_those_of_a_convolution():
    layer = nn.Conv2d(8, 12, 1, groups=2)
    nn.init.zeros_(layer.weight)
    assert reasons(layer, axis="output") == {"weight": "6 output channels per group are not divisible by 4"}
    assert reasons(layer) == {"weight": ""}


def test_sizes_and_axes_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="n=4 of m=4 must satisfy"):
        check_nm(net(), 4, 4)
    with pytest.raises(ValueError, match=r"axis='both' is unknown\. Choose one of 'input', 'output'"):
        check_nm(net(), axis="both")


class Layers(nn.Module):
    """Linear layers of all kinds, with 2:4 weights."""

    def __init__(self):
        super().__init__()
        self.good = nn.Linear(32, 48)
        self.tied, self.tied_too = nn.Linear(32, 32), nn.Linear(32, 32)
        self.tied_too.weight = self.tied.weight
        self.small = nn.Linear(24, 32)
        self.conv = nn.Conv2d(32, 32, 1)
        self.attention = nn.MultiheadAttention(32, 4)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 32)
        self.infinite = nn.Linear(32, 32)
        self.dense = nn.Linear(32, 32)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer is not self.dense:
                    layer.weight.mul_(slow.group_mask(layer.weight, 2, 4, 1))
            self.infinite.weight[0, self.infinite.weight[0].argmax()] = math.inf


def test_only_layers_that_torch_runs_on_the_kernels_are_compressed(monkeypatch):
    monkeypatch.setattr(cusparselt, "probe", lambda dtype, device: None)
    made = []

    def compress(weight):
        made.append(weight)
        return weight.clone()

    monkeypatch.setattr(nm, "to_sparse_semi_structured", compress)
    model = Layers()
    weight = model.good.weight
    rows = {row.name.removesuffix(".weight"): row.reason for row in to_semi_structured(model)}
    inside = "exactly nn.Linear, not in"
    for name, reason in {
        "good": "",
        "tied": "tied to another parameter",
        "tied_too": "tied to another parameter",
        "small": "the input has 24",
        "conv": f"{inside} Conv2d",
        "attention.out_proj": f"{inside} NonDynamicallyQuantizableLinear",
        "encoder.linear1": "fast path",
        "infinite": "it has infinite or NaN weights",
        "dense": "groups have more than 2 of 4 weights",
    }.items():
        assert reason in rows[name]
        assert (rows[name] == "") == (name == "good")
    assert len(made) == 1
    assert torch.equal(made[0], weight)
    assert model.good.weight is not weight
    assert not model.good.weight.requires_grad


def test_a_compressed_weight_that_is_another_is_refused_and_the_model_left_alone(monkeypatch):
    monkeypatch.setattr(cusparselt, "probe", lambda dtype, device: None)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert(model, NMRule(2, 4))
    fold(model)
    weights = [layer.weight for layer in model]
    shifts = iter((0, 1))
    monkeypatch.setattr(nm, "to_sparse_semi_structured", lambda weight: weight.roll(next(shifts)))
    with pytest.raises(RuntimeError, match=r"The compressed '1.weight' is not the dense one.*Keep the model dense"):
        to_semi_structured(model)

    def refuse(weight):
        raise RuntimeError("not on this GPU")

    monkeypatch.setattr(nm, "to_sparse_semi_structured", refuse)
    with pytest.raises(RuntimeError, match=r"torch cannot run '0.weight' on 2:4 kernels here: not on this GPU"):
        to_semi_structured(model)
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))


@pytest.mark.skipif(REASON is None, reason="there is a device with sparse kernels")
def test_without_a_gpu_it_is_refused_with_the_reason():
    model = nn.Linear(32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.mul_(slow.group_mask(model.weight, 2, 4, 1))
    with pytest.raises(RuntimeError, match=f"No layer of Linear can run on 2:4 kernels: {REASON}. Keep it dense."):
        to_semi_structured(model)
    with pytest.raises(RuntimeError, match=r"in bfloat16 or float16, not in torch.float32"):
        to_semi_structured(model.float())
    with pytest.raises(RuntimeError, match="it has no linear layer"):
        to_semi_structured(nn.ReLU())


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype")
@pytest.mark.parametrize("dtype", cusparselt.DTYPES)
def test_a_compressed_model_computes_on_a_gpu_what_the_dense_one_does(dtype):
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128), nn.Linear(128, 10))
    convert(model, NMRule(2, 4))
    fold(model)
    model.to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    assert [row.accepted for row in to_semi_structured(model)] == [True, True, False]
    for tokens in (8, 13, 64):
        x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
        with torch.inference_mode():
            expected = exact(x.double())
            assert (model(x) - expected).norm() <= 1e-2 * expected.norm()
