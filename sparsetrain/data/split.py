"""The fixed split of a labelled set: which samples are held out, and a digest to tell two splits apart."""

import hashlib

import torch
from torch import Tensor

from sparsetrain.rng import generator


def stratified_split(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices (rest, held_out), each ascending, where held_out has `size` samples and every class its share of them.

    Depends on `labels` and `size` alone, never on a run's seed: the seeds of one experiment are compared on the same
    samples. A class of n_c samples out of n gives floor(size * n_c / n) or one more; the classes of largest remainder
    give the one more, ties by class number.

    Args:
        labels: int64 [n], classes 0, 1, ...
        size: samples held out, in [0, n).

    Raises:
        ValueError: `size` outside its range.
    """
    count = len(labels)
    if not 0 <= size < count:
        raise ValueError(f"Cannot hold {size} of {count} samples out; the size must be in [0, {count}).")
    per_class = torch.bincount(labels)
    quota, remainder = per_class * size // count, per_class * size % count
    quota[torch.argsort(remainder, descending=True, stable=True)[: size - int(quota.sum())]] += 1

    shuffled = torch.randperm(count, generator=generator(0, "split"))
    grouped = shuffled[torch.argsort(labels[shuffled], stable=True)]  # class by class, at random within each
    place = torch.arange(count) - (per_class.cumsum(0) - per_class)[labels[grouped]]
    held_out = place < quota[labels[grouped]]
    return grouped[~held_out].sort().values, grouped[held_out].sort().values


def split_digest(*parts: Tensor) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the lengths and values of int64 tensors."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]
