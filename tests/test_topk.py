import math

import numpy as np
import pytest
import torch

from sparsetrain import topk
from sparsetrain.topk import count_largest, mask_largest

SMALL, CHUNK = topk._SMALL, topk._CHUNK


def reference(tensors, kept):
    """Stable sort of everything in falling order: among equals the earlier tensor and the lower row-major index win."""
    joined = np.concatenate([tensor.double().numpy().reshape(-1) for tensor in tensors])
    chosen = np.zeros(len(joined), dtype=bool)
    chosen[np.argsort(-joined, kind="stable")[:kept]] = True
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [torch.from_numpy(part).view(t.shape) for part, t in zip(np.split(chosen, ends), tensors, strict=True)]


def assert_right(tensors, kept):
    expected = reference(tensors, kept)
    counts, cut = count_largest([lambda t=t: t for t in tensors], [t.numel() for t in tensors], kept)
    assert counts == [int(mask.sum()) for mask in expected]
    if 0 < kept < sum(map(torch.Tensor.numel, tensors)):
        assert cut == min(float(t[mask].min()) for t, mask in zip(tensors, expected, strict=True) if mask.any())
    for tensor, count, mask in zip(tensors, counts, expected, strict=True):
        for guess in (None, cut):
            result = mask_largest(tensor, count, guess)
            assert result.dtype == torch.bool
            assert torch.equal(result, mask)


def stream(seed):
    return torch.Generator().manual_seed(seed)


def draw(kind, size, seed=0):
    random = torch.randn(size, generator=stream(seed))
    match kind:
        case "magnitudes":
            return random.abs()
        case "signed":
            return random
        case "tied":
            return random.mul(1.5).round()
        case "two values":
            return (random > 0).float()
        case "zero":
            return torch.zeros(size)
        case "both zeros":
            return torch.where(random > 0, 0.0, -0.0)
        case "denormal":
            return random.mul(8).round() * 1e-45
        case "marked":
            return torch.where(random > 0.3, random, -math.inf)
        case "float64":
            return random.double() + 1e-12 * torch.randn(size, generator=stream(seed + 1)).double()
        case "bfloat16 cast":
            return random.bfloat16().float().abs()
        case "rising":
            return torch.arange(size).float()
        case "falling":
            return -torch.arange(size).float()
        case "heavy tail":
            return random.pow(9).abs()
    raise AssertionError(kind)


KINDS = [
    "magnitudes",
    "signed",
    "tied",
    "two values",
    "zero",
    "both zeros",
    "denormal",
    "marked",
    "float64",
    "bfloat16 cast",
    "rising",
    "falling",
    "heavy tail",
]


def some(size):
    """Counts at both ends, in the middle, and where the scores above zero end."""
    return sorted({0, 1, 2, size // 10, size // 2, size * 9 // 10, size - 1, size} & set(range(size + 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 17, 300, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL])
def test_agrees_with_a_stable_sort_on_one_tensor(kind, size):
    for kept in some(size):
        assert_right([draw(kind, size)], kept)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_a_stable_sort_over_several_tensors_of_any_size(kind):
    tensors = [draw(kind, size, seed) for seed, size in enumerate((5, 0, 1, 2500, 4000, 0, 300))]
    for kept in some(sum(map(len, tensors))):
        assert_right(tensors, kept)


@pytest.mark.parametrize("kind", ["magnitudes", "tied", "marked"])
def test_agrees_with_a_stable_sort_for_every_count(kind):
    tensors = [draw(kind, size, seed).view(-1, 3) for seed, size in enumerate((12, 27, 6))]
    for kept in range(46):
        assert_right(tensors, kept)


@pytest.mark.parametrize("kind", ["magnitudes", "tied", "two values", "both zeros", "marked", "rising"])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 1, 1, 1), (1, 16, 1, 1), (40, 30, 3, 3)])
def test_channels_last_ties_go_by_row_major_index_and_the_mask_has_its_strides(kind, shape):
    score = draw(kind, math.prod(shape)).view(shape).to(memory_format=torch.channels_last)
    for kept in some(score.numel()):
        assert_right([score, score], kept)
        assert mask_largest(score, kept).stride() == score.stride()


def test_transposed_and_sliced_scores_are_read_as_they_look():
    base = draw("tied", 6000).view(60, 100)
    for score in (base.t(), base[:, ::3], base[5:, 1:99], base.view(5, 12, 100).permute(2, 0, 1)):
        for kept in some(score.numel()):
            assert_right([score], kept)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("kind", ["magnitudes", "tied"])
def test_agrees_at_the_boundary_of_a_chunk(kind, size):
    assert_right([draw(kind, size)], size // 10)


def test_agrees_with_many_chunks_and_a_part_of_one(monkeypatch):
    monkeypatch.setattr(topk, "_CHUNK", 64)
    for size in (63, 64, 65, 5 * 64, 5 * 64 + 1, 10_000):
        assert_right([draw("tied", size), draw("magnitudes", size)], size // 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["magnitudes", "tied", "heavy tail", "rising"])
def test_agrees_on_millions(kind):
    tensors = [draw(kind, size, seed) for seed, size in enumerate((3 * CHUNK + 5, 2 * CHUNK, 1, 700_001))]
    total = sum(map(len, tensors))
    for kept in (1, total // 100, total // 5, total - 1):
        assert_right(tensors, kept)


def misleading(size, kind):
    """Scores of which every stride-th, the sample, is unlike the others."""
    stride = round(size ** (1 / 3))
    sampled = torch.arange(size) % stride == 0
    scores = 1 + draw("magnitudes", size)
    match kind:
        case "sample lowest":
            return torch.where(sampled, -scores, scores)
        case "sample highest":
            return torch.where(sampled, scores, -scores)
        case "sample constant":
            return torch.where(sampled, 1.5, scores)
        case "sample in a far gap":
            return torch.where(sampled, 100 + scores, torch.where(torch.arange(size) % 3 > 0, scores, 200 + scores))
    return torch.arange(size) % stride + 0.0  # periodic with the stride


@pytest.mark.parametrize(
    "kind", ["sample lowest", "sample highest", "sample constant", "sample in a far gap", "periodic with the stride"]
)
@pytest.mark.parametrize("size", [SMALL + 1, 20_000])
def test_a_misleading_sample_is_found_out_and_the_result_right(kind, size, monkeypatch):
    searches = 0
    count_and_gather = topk._count_and_gather

    def counting(*args):
        nonlocal searches
        searches += 1
        return count_and_gather(*args)

    monkeypatch.setattr(topk, "_count_and_gather", counting)
    scores, most = misleading(size, kind), 0
    for kept in some(size):
        searches = 0
        count_largest([lambda: scores], [size], kept)
        most = max(most, searches)
        assert_right([scores], kept)
    assert 1 < most < 10


@pytest.mark.parametrize("kind", ["magnitudes", "tied", "marked", "zero"])
def test_a_wrong_guess_changes_nothing(kind):
    score = draw(kind, 5000)
    for kept in some(5000):
        expected = reference([score], kept)[0]
        for guess in (-math.inf, -1.0, 0.0, 0.5, 1.0, 1e30, math.inf, math.nan):
            assert torch.equal(mask_largest(score, kept, guess), expected)


def test_float32_and_float64_scores_are_ranked_together_exactly():
    single = torch.tensor([0.1, 0.3, 0.7])  # 0.1f > 0.1, 0.3f > 0.3, 0.7f < 0.7
    double = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    for tensors in ([single, double], [double, single]):
        for kept in range(7):
            assert_right(tensors, kept)


def test_the_scores_are_made_at_most_three_times_and_not_changed():
    score, calls = draw("magnitudes", 10_000), 0
    before = score.clone()

    def make():
        nonlocal calls
        calls += 1
        return score

    count_largest([make], [10_000], 1000)
    assert calls <= 3
    assert torch.equal(score, before)


def test_none_kept_and_all_kept_ask_for_no_scores():
    def refuse():
        raise AssertionError("asked for scores")

    assert count_largest([refuse, refuse], [3, 4], 0) == ([0, 0], math.inf)
    assert count_largest([refuse, refuse], [3, 4], 7) == ([3, 4], -math.inf)


def test_scalar_and_empty_scores_have_masks():
    assert mask_largest(torch.tensor(2.0), 1).tolist() is True
    assert mask_largest(torch.tensor(2.0), 0).tolist() is False
    assert mask_largest(torch.zeros(0, 3), 0).shape == (0, 3)
