"""The k largest of many scores, exactly, without sorting or joining them.

A deterministic strided sample brackets the k-th largest value, one pass counts what lies above the bracket and gathers
what lies inside, and the k-th is selected among those few: time linear in the number of scores, and memory for the
scores of one tensor at a time. Equal scores are told apart by position: the earlier tensor and the lower index win, so
the result is one definite set on every device and rank.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scores = Callable[[], Tensor]
"""Makes the scores of one tensor, on demand: they are asked for a few times and never kept."""

_SMALL = 1 << 12  # scores up to which all of them are the sample
_CHUNK = 1 << 18  # elements; a chunk and its comparisons stay in the cache


def count_largest(scores: Sequence[Scores], sizes: Sequence[int], kept: int) -> tuple[list[int], float]:
    """How many of the `kept` largest scores lie in each tensor, and the smallest score among them.

    Args:
        scores: one maker of finite scores per tensor.
        sizes: the number of scores of each tensor.
        kept: how many to keep in all, in [0, sum(sizes)].

    Returns:
        One count per tensor, which add up to `kept`, and the `kept`-th largest score (inf if none is kept, -inf if all
        are).
    """
    if kept == 0:
        return [0] * len(sizes), math.inf
    if kept == sum(sizes):
        return list(sizes), -math.inf
    threshold, above, equal = _kth_largest(scores, sizes, kept)
    counts, left = [], kept - sum(above)
    for n_above, n_equal in zip(above, equal, strict=True):
        ties = min(left, n_equal)
        counts.append(n_above + ties)
        left -= ties
    return counts, threshold


def mask_largest(score: Tensor, kept: int, guess: float | None = None) -> Tensor:
    """True at the `kept` largest entries of `score`; among equals the lower (row-major) index wins.

    Args:
        score: finite, any shape; -inf marks entries that come last.
        kept: in [0, score.numel()].
        guess: what the `kept`-th largest score probably is; right, it spares the search, wrong, it changes nothing.

    Returns:
        Bool mask of the same shape with exactly `kept` True, in the memory format of `score`.
    """
    if kept == score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    if kept == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if guess is not None:
        mask = score >= guess
        if _count(mask) == kept:
            return mask
    threshold, (above,), (equal,) = _kth_largest([lambda: score], [score.numel()], kept)
    if above + equal == kept:
        return score >= threshold
    mask = score > threshold
    ties = (score == threshold).flatten().nonzero().squeeze(1)[: kept - above]
    mask[torch.unravel_index(ties, mask.shape)] = True
    return mask


def _kth_largest(scores: Sequence[Scores], sizes: Sequence[int], kept: int) -> tuple[float, list[int], list[int]]:
    """The `kept`-th largest score, and per tensor how many scores lie above it and how many equal it."""
    total = sum(sizes)
    sample = _sorted_sample(scores, total)
    position = kept / total * len(sample)
    margin = 0 if len(sample) == total else 4 * math.sqrt(len(sample))  # of a binomial: at least 8 deviations
    while True:
        high = _at(sample, position - margin - 1, before=math.inf)
        low = _at(sample, position + margin, after=-math.inf)
        above, inside = _count_and_gather(scores, low, high, sample.dtype)
        rank = kept - sum(above)
        if 0 < rank <= sum(len(part) for part in inside):
            break
        margin = 4 * margin + 1  # the sample misled: the next bracket holds this one, in the end everything
    candidates = torch.cat(inside)
    threshold = torch.kthvalue(candidates, len(candidates) - rank + 1).values
    above = [n + int((part > threshold).sum()) for n, part in zip(above, inside, strict=True)]
    equal = [int((part == threshold).sum()) for part in inside]
    return float(threshold), above, equal


def _sorted_sample(scores: Sequence[Scores], total: int) -> Tensor:
    """Every stride-th score, the largest first, on the CPU."""
    stride = 1 if total <= _SMALL else round(total ** (1 / 3))
    parts, offset = [], 0
    for make in scores:
        flat = _flat(make())
        parts.append(flat[offset::stride].to("cpu", copy=True))  # a view would keep all scores alive
        offset = (offset - len(flat)) % stride
    return torch.cat(parts).sort(descending=True).values


def _at(sample: Tensor, position: float, *, before: float = math.nan, after: float = math.nan) -> float:
    index = math.floor(position)
    if index < 0:
        return before
    return after if index >= len(sample) else float(sample[index])


def _count_and_gather(
    scores: Sequence[Scores], low: float, high: float, dtype: torch.dtype
) -> tuple[list[int], list[Tensor]]:
    """Per tensor, the number of scores above `high`, and the scores in [low, high], compared as `dtype`."""
    above, inside = [], []
    for make in scores:
        counts, parts = [], []
        for part in torch.split(_flat(make()), _CHUNK):
            chunk = part.to(dtype)  # a float64 bound beside float32 scores would be rounded
            is_above = chunk > high
            counts.append(torch.count_nonzero(is_above))
            parts.append(chunk[(chunk >= low) ^ is_above])
        above.append(torch.stack(counts).sum())
        inside.append(torch.cat(parts))
    return [int(n) for n in above], inside


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _flat(score: Tensor) -> Tensor:
    """The scores in the order of memory, so that channels_last needs no copy; counts do not depend on order."""
    strides = score.stride()
    return score.permute(sorted(range(score.dim()), key=lambda d: -strides[d])).reshape(-1)
