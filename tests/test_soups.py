import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsetrain import prune, save_masks
from sparsetrain.soups import RunningMean, distances, greedy, recalibrate, uniform
from sparsetrain.soups.members import AT_ONCE, MAPPED, opened

LONG = 2 * AT_ONCE + 3  # read in three parts


def member(seed: int, *, pruned: float = 0.5) -> dict[str, Tensor]:
    """A state dict with the same zeros for every seed."""
    stream = torch.Generator().manual_seed(seed)
    keep = torch.rand(3, LONG // 3, generator=torch.Generator().manual_seed(1)) >= pruned
    return {
        "wide.weight": torch.randn(3, LONG // 3, generator=stream) * keep,
        "wide.bias": torch.randn(LONG, generator=stream),
        "conv.weight": torch.randn(4, 2, 3, 3, generator=stream).to(memory_format=torch.channels_last),
        "half.weight": torch.randn(5, 7, generator=stream).bfloat16(),
        "double.weight": torch.randn(4, 6, generator=stream, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(seed),
        "positions": torch.arange(6),
        "nothing": torch.empty(0, 3),
    }


def masks_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"wide.weight": state["wide.weight"] != 0}


def saved(folder: Path, members: Sequence[Mapping[str, Tensor]]) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(members))]
    for path, state in zip(paths, members, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return paths


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10])
def test_a_soup_of_equal_members_is_that_member_bit_for_bit(tmp_path, count):
    state = member(3)
    state["wide.bias"][:3] = torch.tensor([-0.0, 1e-45, 3e38])
    masks = masks_of(state)
    for members in ([state] * count, saved(tmp_path, [state]) * count):
        soup = uniform(members, [masks] * count)
        assert soup.keys() == state.keys()
        assert {name: bits(soup[name]) for name in soup} == {
            name: bits(tensor.masked_fill(~masks[name], 0) if name in masks else tensor)
            for name, tensor in state.items()
        }
    if count in (3, 5, 7):  # what a sum would have given
        total = sum(itertools.repeat(state["wide.bias"], count - 1), state["wide.bias"])
        assert not torch.equal(total / count, state["wide.bias"])


INFINITE = {
    "causal": torch.full((4, 4), -math.inf).triu(1),
    "half": torch.tensor([math.inf, 1.0, -math.inf]).bfloat16(),
    "w": torch.tensor([2.0, -0.0]),
}


def running(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    mean = RunningMean()
    for state in members:
        mean.add(state)
    return mean.tensors


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_an_infinity_that_all_members_hold_is_that_of_the_soup(tmp_path, count):
    others = [INFINITE | {"w": torch.tensor([2.0 + number, -0.0])} for number in range(count)]
    for soup in (
        uniform(others),
        uniform(others, [{}] * count),
        uniform(saved(tmp_path, others)),
        {name: tensor.to(INFINITE[name].dtype) for name, tensor in running(others).items()},
    ):
        assert {name: bits(soup[name]) for name in ("causal", "half")} == {
            name: bits(INFINITE[name]) for name in ("causal", "half")
        }
        assert soup["w"].tolist() == [2 + (count - 1) / 2, 0.0]


@pytest.mark.parametrize(
    "values",
    [
        (math.inf, math.inf, 1.0),
        (math.inf, 1.0, math.inf),
        (1.0, math.inf, math.inf),
        (math.inf, -math.inf, math.inf),
        (math.inf, math.inf, math.nan),
        (math.nan, math.nan, math.nan),
        (-3e38, -3e38, 3e38),
    ],
)
def test_a_mean_that_is_not_finite_is_refused_where_not_all_hold_the_same_infinity(values):
    members = [INFINITE | {"w": torch.tensor([value])} for value in values]
    with pytest.raises(ValueError, match="The mean of 'w' is not finite: a member has diverged"):
        uniform(members, [{}] * 3)
    with pytest.raises(ValueError, match="The mean of 'w' is not finite: a member has diverged"):
        running(members)


def test_a_soup_is_the_float64_mean_in_each_members_type_with_the_zeros_of_the_masks(tmp_path):
    members = [member(seed) for seed in range(8)]
    masks = masks_of(members[0])
    dirty = [state | {"wide.weight": state["wide.weight"] + ~masks["wide.weight"]} for state in members]
    soups_made = [uniform(dirty, [masks] * 8), uniform(saved(tmp_path, dirty), [masks] * 8), uniform(members)]
    for soup in soups_made:
        for name in ("wide.weight", "wide.bias", "conv.weight", "half.weight"):
            mean = torch.stack([state[name].double() for state in members]).sum(0) / 8
            close = (
                {"atol": 1e-6, "rtol": 0.0} if members[0][name].dtype == torch.float32 else {"atol": 0, "rtol": 2**-8}
            )
            torch.testing.assert_close(soup[name].double(), mean, **close)
            assert (soup[name].dtype, soup[name].shape) == (members[0][name].dtype, members[0][name].shape)
        assert soup["norm.num_batches_tracked"] == 7
        assert torch.equal(soup["positions"], torch.arange(6))
        assert torch.equal(soup["wide.weight"] != 0, masks["wide.weight"])
        assert not soup["wide.weight"][~masks["wide.weight"]].signbit().any()
    assert all(bits(soups_made[0][name]) == bits(soups_made[1][name]) for name in members[0])


def test_pruned_places_become_positive_zero_without_masks_too():
    state = {"w": torch.tensor([[-0.0, 1.0]]), "b": torch.tensor([-0.0])}
    soup = uniform([state] * 3)
    assert soup["w"].signbit().tolist() == [[False, False]]
    assert soup["b"].signbit().tolist() == [True]  # a bias is not pruned


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masks_make_positive_zeros_and_leave_the_bits_of_kept_weights_in_every_type(dtype):
    state = {"w": torch.tensor([[-0.0, -2.0, 3.0]], dtype=dtype)}
    soup = uniform([state] * 3, [{"w": torch.tensor([[True, False, True]])}] * 3)
    assert bits(soup["w"]) == bits(torch.tensor([[-0.0, 0.0, 3.0]], dtype=dtype))
    assert state["w"][0, 1] == -2.0


def test_masks_may_lie_in_memory_otherwise_than_their_weights():
    state = {"w": torch.randn(4, 3, 2, 2)}
    mask = torch.rand(4, 3, 2, 2) < 0.5
    masks = [{"w": mask}, {"w": mask.to(memory_format=torch.channels_last)}]
    for given in (masks, masks[::-1]):
        assert torch.equal(uniform([state] * 2, given)["w"], state["w"] * mask)


def test_a_kept_weight_that_is_zero_by_chance_is_no_pruned_one_where_masks_are_given(tmp_path):
    one, other = {"w": torch.tensor([[0.0, 0.0, 4.0]])}, {"w": torch.tensor([[2.0, 0.0, 4.0]])}
    masks = {"w": torch.tensor([[True, False, True]])}
    save_masks(masks, tmp_path / "masks.safetensors")
    assert uniform([one, other], [masks, tmp_path / "masks.safetensors"])["w"].tolist() == [[1.0, 0.0, 4.0]]
    with pytest.raises(ValueError, match=r"'w' is pruned in member 1 at other .* is 0 by chance, give masks\."):
        uniform([one, other])
    assert uniform([one, other], [{}, {}])["w"].tolist() == [[1.0, 0.0, 4.0]]


def test_members_with_other_masks_are_refused_by_the_first_tensor_that_differs(tmp_path):
    state = {"a": torch.ones(2, 2), "b": torch.ones(2, 2), "c": torch.ones(2, 2)}
    keep = {name: torch.tensor([[True, False], [True, True]]) for name in state}
    other = keep | {"b": ~keep["b"], "c": ~keep["c"]}
    with pytest.raises(ValueError, match="'b' is pruned in member 2 at other places than in member 0: their mean"):
        uniform([state] * 3, [keep, keep, other])
    with pytest.raises(ValueError, match="'c' is pruned in member 1"):
        uniform([state] * 2, [keep, {name: keep[name] for name in "ab"}])
    files = [tmp_path / name for name in ("keep", "again", "other")]
    for path, masks in zip(files, (keep, keep, other), strict=True):
        save_masks(masks, path)
    assert uniform([state] * 2, files[:2])["b"].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match="'b' is pruned in member 2"):
        uniform([state] * 3, files)
    # As many zeros, at other places, in the files alone.
    paths = saved(tmp_path, [{n: t * keep[n] for n, t in state.items()}, {n: t * other[n] for n, t in state.items()}])
    save_file({"a": state["a"] * keep["a"], "b": state["b"] * keep["b"].T, "c": state["c"] * keep["c"]}, paths[1])
    with pytest.raises(ValueError, match=r"'b' is pruned in .*1\.safetensors at other places than in .*0\.safetensors"):
        uniform(paths)


STATE = {"w": torch.ones(2, 3), "n": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("members", "masks", "message"),
    [
        ([], None, "at least one member"),
        ([STATE, {"w": STATE["w"]}], None, r"'n' is \(2,\) int64 in member 0 and missing in member 1"),
        ([{"w": STATE["w"]}, STATE], None, "'n' is missing in member 0 and"),
        ([STATE, STATE | {"w": torch.ones(3, 2)}], None, r"'w' is \(2, 3\) float32 in member 0 and \(3, 2\) float32"),
        ([STATE, STATE | {"w": STATE["w"].half()}], None, r"and \(2, 3\) float16 in member 1\. Average members of one"),
        ([STATE, STATE | {"n": torch.tensor([1, 3])}], None, "'n' is of int64 and differs between members"),
        ([STATE, STATE | {"w": torch.full((2, 3), math.nan)}], [{}, {}], "'w' is not finite: a member has diverged"),
        ([STATE, STATE], [{}], "There are 2 members and masks of 1"),
        ([STATE], [{"v": torch.ones(2, 3) > 0}], r"mask of 'v' has shape \(2, 3\); the tensor is missing"),
        (
            [STATE],
            [{"w": torch.ones(3, 2) > 0}],
            r"has shape \(3, 2\); the tensor is \(2, 3\) float32\. Give",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(members, masks, message):
    with pytest.raises(ValueError, match=message):
        uniform(members, masks)


def test_a_damaged_file_and_one_of_another_kind_are_refused(tmp_path):
    (path,) = saved(tmp_path, [STATE])
    whole = path.read_bytes()
    for content in (whole[:-1], b"PK\x03\x04 a checkpoint of torch.save"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"0\.safetensors is no whole safetensors file .* Write it with save_file"):
            uniform([path])
    save_file({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"holds tensors of type F8_E4M3\. Convert them to one of F64, F32"):
        uniform([path])


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path):
    (path,) = saved(tmp_path, [STATE])
    with opened([path]) as (source,):
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="became shorter while it was read"):
            _ = [source.read(name, slice(0, shape.numel())) for name, (shape, _) in source.kinds.items()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_the_soup_however_many_files_there_are(tmp_path):
    paths = saved(tmp_path, [{"w": torch.ones(3_000_000), "v": torch.ones(1000, 1000)}])
    size = paths[0].stat().st_size
    uniform(paths)

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    soup = uniform(paths * 50, [{}] * 50)
    assert memory("VmHWM") - before < 1.2 * size + MAPPED
    assert float(soup["w"].sum()) == 3e6


def test_greedy_takes_what_does_not_harm_best_first(tmp_path):
    members = [{"w": row} for row in torch.eye(4)]  # a soup of some has their places
    metric = {(0,): 0.5, (1,): 0.9, (2,): 0.7, (3,): 0.7, (1, 2): 0.8, (1, 3): 0.9, (0, 1, 3): 0.95}
    tried = []

    def evaluate(state: dict[str, Tensor]) -> float:
        tried.append(tuple(state["w"].nonzero().flatten().tolist()))
        return metric[tried[-1]]

    for given in (members, saved(tmp_path, members)):
        tried.clear()
        soup, chosen = greedy(given, [{}] * 4, evaluate=evaluate)
        assert chosen == [1, 3, 0]
        torch.testing.assert_close(soup["w"], torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3)
        assert tried[-3:] == [(1, 2), (1, 3), (0, 1, 3)]


@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_soup_is_never_worse_than_its_best_member(seed):
    target = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    members = [{"w": torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * seed + i))} for i in range(1, 6)]

    def evaluate(state: dict[str, Tensor]) -> float:
        return -float((state["w"] - target).norm())

    soup, chosen = greedy(members, evaluate=evaluate)
    assert evaluate(soup) >= max(evaluate(state) for state in members) == evaluate(members[chosen[0]])
    assert torch.equal(soup["w"], uniform([members[i] for i in chosen])["w"])


def test_greedy_refuses_other_masks_before_it_evaluates_and_a_metric_that_is_nan():
    states = [{"w": torch.tensor([[0.0, 1.0]])}, {"w": torch.tensor([[1.0, 0.0]])}]
    masks = [{"w": state["w"] != 0} for state in states]
    with pytest.raises(ValueError, match="'w' is pruned in member 1"):
        greedy(states, masks, evaluate=lambda _: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=r"metric of the soup of members \[0\] is NaN"):
        greedy(states[:1], evaluate=lambda _: math.nan)


def test_distances_are_those_of_all_weights_without_the_statistics_of_batch_norm(tmp_path):
    members = [member(seed) | {"norm.running_var": torch.full((2,), 1e6 * seed)} for seed in (0, 1, 2, 1)]
    weights = [torch.cat([state[n].double().flatten() for n in list(state)[:5]]) for state in members]
    expected = torch.stack([torch.stack([(one - other).norm() for other in weights]) for one in weights])
    for given in (members, saved(tmp_path, members)):
        found = distances(given)
        torch.testing.assert_close(found, expected, atol=0.0, rtol=1e-12)
        assert found[1, 3] == 0.0


def test_an_infinity_that_members_share_is_no_distance():
    found = distances([INFINITE, INFINITE | {"w": torch.tensor([5.0, 4.0])}])
    assert found.tolist() == [[0.0, 5.0], [5.0, 0.0]]


class Net(nn.Module):
    """Batch norm of three kinds of momentum, dropout, and a layer that refuses training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(3, momentum=None)
        self.third = nn.BatchNorm2d(3, momentum=0.5, affine=False)
        self.stateless = nn.BatchNorm2d(3, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.modes: list[tuple[bool, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(tuple(layer.training for layer in self.modules()))
        return self.instance(self.stateless(self.third(self.second(self.dropout(self.first(images))))))


def batches(count: int = 4) -> list[Tensor]:
    stream = torch.Generator().manual_seed(5)
    return [torch.randn(6, 3, 4, 4, generator=stream) * (i + 1) + i for i in range(count)]


def used(net: Net) -> Net:
    for batch in batches(2):
        net(batch + 3)
    net.modes.clear()
    return net


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_recalibration_gives_the_mean_over_batches_and_changes_nothing_else(mode):
    torch.manual_seed(0)
    net = used(Net())
    if mode != "train":
        net.eval()
    if mode == "mixed":
        net.third.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [layer.training for layer in net.modules()]
    recalibrate(net, batches())
    # The slow reference: each layer normalizes with the statistics of the batch.
    expected = {"first": [], "second": [], "third": []}
    for images in batches():
        for name in expected:
            expected[name].append((images.mean((0, 2, 3)), images.transpose(0, 1).flatten(1).var(1)))
            images = (images - expected[name][-1][0].view(-1, 1, 1)) / (
                images.var((0, 2, 3), correction=0, keepdim=True)[0] + 1e-5
            ).sqrt()
    for name, moments in expected.items():
        layer = net.get_submodule(name)
        for buffer, values in (("running_mean", 0), ("running_var", 1)):
            mean = torch.stack([moment[values] for moment in moments]).mean(0)
            torch.testing.assert_close(layer.get_buffer(buffer), mean, atol=1e-5, rtol=1e-5)
            del before[f"{name}.{buffer}"]
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert [layer.momentum for layer in (net.first, net.second, net.third)] == [0.1, None, 0.5]
    assert [layer.training for layer in net.modules()] == modes
    during = dict(zip((name for name, _ in net.named_modules()), net.modes[0], strict=True))
    assert [name for name, training in during.items() if training] == ["first", "second", "third"]
    assert all(tensor.grad_fn is None for tensor in net.buffers())


@pytest.mark.parametrize(("images", "taken"), [(None, 4), (24, 4), (13, 3), (12, 2), (1, 1)])
def test_recalibration_ends_with_the_batch_in_which_so_many_images_have_been_seen(images, taken):
    net = Net()
    recalibrate(net, batches(), images=images)
    assert len(net.modes) == taken


@pytest.mark.parametrize("moment", ["no batch", "in the loader", "in the module"])
def test_after_an_error_everything_is_as_before(moment):
    net = used(Net()).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def broken():
        if moment != "no batch":
            yield from batches(2)
            yield torch.ones(2, 5, 4, 4) if moment == "in the module" else 1 / 0

    errors = {"no batch": ValueError, "in the loader": ZeroDivisionError, "in the module": RuntimeError}
    with pytest.raises(errors[moment]):
        recalibrate(net, broken())
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert [layer.momentum for layer in (net.first, net.second, net.third)] == [0.1, None, 0.5]
    assert not any(layer.training for layer in net.modules())


def test_a_module_without_batch_norm_is_not_called():
    recalibrate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), iter(lambda: 1 / 0, None))


def test_a_soup_of_pruned_networks_has_their_sparsity_and_loads_into_the_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    masks = prune(net, 0.7)
    members = []
    for _ in range(3):
        for parameter in net.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        masks.apply_()
        members.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    net.load_state_dict(uniform(members, [dict(masks)] * 3))
    zeros = sum(int((parameter == 0).sum()) for name, parameter in net.named_parameters() if name in masks)
    assert zeros == sum(int((~mask).sum()) for mask in masks.values())


def test_members_in_channels_last_are_averaged_as_others():
    members = [{"w": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)} for _ in range(3)]
    assert torch.equal(running(members)["w"], uniform(members)["w"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"w": torch.zeros(2, 3)}, r"'n' is not in all members"),
        (
            {"w": torch.zeros(3, 2), "n": torch.tensor([1, 1])},
            r"'w' has shape \(3, 2\) in this member and",
        ),
        (
            {"w": torch.full((2, 3), torch.nan), "n": torch.tensor([1, 1])},
            r"The mean of 'w' is not finite: a member has",
        ),
        ({"w": torch.zeros(2, 3), "n": torch.tensor([1, 2])}, r"'n' is of int64 and differs between members"),
    ],
)
def test_a_running_mean_refuses_a_member_and_stays_as_it_was(bad, message):
    mean = RunningMean()
    for value in (1.0, 3.0):
        mean.add({"w": torch.full((2, 3), value), "n": torch.tensor([1, 1])})
    with pytest.raises(ValueError, match=message):
        mean.add(bad)
    assert mean.count == 2
    mean.add({"w": torch.full((2, 3), 5.0), "n": torch.tensor([1, 1])})
    assert torch.equal(mean.tensors["w"], torch.full((2, 3), 3.0))


def test_of_counts_and_flags_the_largest_is_taken_and_a_stretch_of_one_element_is_none():
    members = [{"steps": torch.tensor(n), "ready": torch.tensor([n > 3]), "at": torch.tensor([n])} for n in (3, 9, 5)]
    assert_soups(members, {"steps": torch.tensor(9), "ready": torch.tensor([True]), "at": torch.tensor([9])})
    longs = [{"order": torch.arange(AT_ONCE + 1)}, {"order": torch.cat([torch.arange(AT_ONCE), torch.tensor([0])])}]
    for make in (uniform, running):
        with pytest.raises(ValueError, match="'order' is of int64 and differs between members"):
            make(longs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors_are_averaged_with_the_zeros_of_their_masks(dtype):
    torch.manual_seed(0)
    mask = torch.rand(3, 4) > 0.5
    members = [{"w": torch.randn(3, 4, dtype=dtype) * mask} for _ in range(3)]
    mean = torch.stack([torch.stack([m["w"].real, m["w"].imag]).double() for m in members]).sum(0) / 3
    for soup in (uniform(members), uniform(members, [{"w": mask}] * 3), running(members)):
        assert soup["w"].dtype == dtype
        torch.testing.assert_close(torch.stack([soup["w"].real, soup["w"].imag]).double(), mean, atol=1e-6, rtol=0)
        assert torch.equal(soup["w"] != 0, mask)
    for wrong in (math.inf, complex(0, math.inf), math.nan):
        bad = {"w": members[0]["w"] + wrong}
        for make in (partial(uniform, masks=[{}] * 3), running):
            with pytest.raises(ValueError, match="'w' is not finite: a member has diverged"):
                make([members[0], bad, members[1]])


def assert_soups(members: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for soup in (uniform(members), running(members)):
        assert soup.keys() == expected.keys()
        assert all(torch.equal(soup[name], tensor) for name, tensor in expected.items())


def test_a_running_mean_refuses_a_first_member_that_has_diverged():
    with pytest.raises(ValueError, match="a member has diverged"):
        RunningMean().add({"w": torch.tensor([torch.nan])})


@pytest.mark.parametrize("members", ["a.safetensors", {"w": torch.zeros(1)}], ids=["file", "state_dict"])
def test_one_member_in_the_place_of_a_list_is_refused(members):
    with pytest.raises(ValueError, match=r"are a list of state dicts or files"):
        uniform(members)


def test_layers_that_no_batch_reaches_and_frozen_ones_keep_their_statistics():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.frozen(self.used(x))

    module = Module().eval()
    for norm in (module.used, module.frozen, module.teacher):
        norm.running_mean.fill_(5.0)
    recalibrate(module, [torch.randn(8, 3)], frozen=[module.frozen])
    assert (module.used.running_mean.abs() < 4).all()
    for norm in (module.frozen, module.teacher):
        assert torch.equal(norm.running_mean, torch.full((3,), 5.0))
        assert torch.equal(norm.running_var, torch.ones(3))


def test_complex_tensors_have_distances():
    one = {"w": torch.tensor([1 + 1j, 2j])}
    assert distances([one, {"w": one["w"] + (3 + 4j)}])[0, 1] == pytest.approx(50**0.5)


def test_equal_counts_of_types_without_an_order_and_conjugate_views_are_averaged():
    members = [{"n": torch.tensor(3, dtype=torch.uint32), "w": torch.ones(2, 3, dtype=torch.complex64).conj()}] * 2
    for soup in (uniform(members), running(members)):
        assert soup["n"] == 3
        assert torch.equal(soup["w"], members[0]["w"].resolve_conj())
