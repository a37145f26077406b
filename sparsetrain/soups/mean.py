"""The uniform soup: the mean of several networks, of members at hand or one after the other."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparsetrain.soups.members import (
    Member,
    MemberMasks,
    common_kinds,
    common_masks,
    equal_bools,
    opened,
    parts,
    pruned_otherwise,
)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def uniform(members: Sequence[Member], masks: Sequence[MemberMasks] | None = None) -> dict[str, Tensor]:
    """The mean of `members`, in which every pruned weight is exactly 0.

    Files are read a stretch at a time, so memory holds the soup and one pair of masks, however many members there are.
    Each mean is a running one in float32 (float64 of float64 weights), rounded to the members' type: members that are
    equal give themselves, bit for bit; an infinity that all hold, as in a causal mask, stays. Of integers and bools of
    one element, such as `num_batches_tracked`, the largest is taken; other ones have to be equal. The running
    statistics of batch norm are averaged as well; see `recalibrate` for better ones.

    Args:
        members: of the same names, shapes and types.
        masks: of each member. None takes the zeros of floating and complex tensors of two or more dimensions for
            pruned; a kept weight may be 0 by chance, so give masks where they exist. `[{}] * len(members)` says that
            none is pruned.

    Returns:
        A state dict on the CPU.

    Raises:
        ValueError: no members; members that differ in a name, shape or type; masks that differ, or fit no member; a
            mean that is not finite, but for infinities that all hold; a file that is no whole safetensors file.

    Source: Zimmer et al. 2024, arXiv:2306.16788; Wortsman et al. 2022, arXiv:2203.05482 (uniform soup).
    """
    with opened(members) as sources:
        kinds = common_kinds(sources)
        labels = [source.label for source in sources]
        kept = None if masks is None else common_masks(masks, kinds, labels)
        soup = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        for name, tensor in soup.items():
            mask = kept[name].cpu().reshape(-1) if kept and name in kept else None
            for part in parts(tensor.numel()):
                pieces, out = (source.read(name, part) for source in sources), tensor.view(-1)[part]
                if not _has_mean(tensor):
                    out.copy_(_merge(name, pieces, tensor.numel()))
                elif kept is None and tensor.ndim >= 2:
                    _write_mean_with_zeros_(out, name, pieces, labels)
                else:
                    _write_mean_(out, name, pieces)
                if mask is not None:
                    _zero_(out, mask[part])
    return soup


class RunningMean:
    """The uniform soup of members that come one after the other: bit for bit what `uniform` makes of all of them.

    Args:
        tensors: the mean of `count` members, to go on with; taken as they are.
        count: members so far.

    Attributes:
        tensors: name -> the mean so far, on the CPU; in float32 where the members have less.
        count: members so far.
    """

    def __init__(self, tensors: dict[str, Tensor] | None = None, count: int = 0) -> None:
        self.tensors, self.count = tensors or {}, count

    def add(self, member: Mapping[str, Tensor]) -> None:
        """Take in a member with the names and shapes of the others.

        Raises:
            ValueError: as `uniform`: other names or shapes, a mean that is not finite, or integers that differ. Then
                the mean is that of the members before.
        """
        member = {name: tensor.detach().cpu() for name, tensor in member.items()}
        self._check(member)
        self.count += 1
        for name, tensor in member.items():
            if self.count == 1:
                kept = tensor.to(_mean_type(tensor), copy=True)
                self.tensors[name] = kept.contiguous()
                continue
            mean, piece = self.tensors[name].view(-1), tensor.reshape(-1)
            for part in parts(len(mean)):
                if _has_mean(mean):
                    _take_in_(mean[part], name, [piece[part]], self.count)
                else:
                    mean[part] = _merge(name, (mean[part], piece[part]), len(mean))

    def _check(self, member: Mapping[str, Tensor]) -> None:
        before = self.tensors if self.count else member
        if differing := sorted(before.keys() ^ member.keys()):
            raise ValueError(f"{differing[0]!r} is not in all members. Average networks of one architecture.")
        for name, tensor in member.items():
            mean = before[name]
            if tensor.shape != mean.shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} in this member and {tuple(mean.shape)} in those before. "
                    "Average networks of one architecture."
                )
            if not _has_mean(mean):
                _merge(name, (mean, tensor), tensor.numel())
            elif not (_is_finite(mean) and _is_finite(tensor)):
                # But for infinities that all hold; NaN is unlike itself.
                unlike = ~(tensor.isfinite() & mean.isfinite()) & (_as(mean.dtype, tensor) != mean)
                if bool(unlike.any()):
                    raise _diverged(name)


def _write_mean_(out: Tensor, name: str, pieces: Iterable[Tensor]) -> None:
    pieces = iter(pieces)
    mean = out if out.dtype == _mean_type(out) else torch.empty_like(out, dtype=_mean_type(out))
    mean.copy_(next(pieces))
    _take_in_(mean, name, pieces, 2)
    if mean is not out:
        out.copy_(mean)


def _mean_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if _has_mean(tensor) else tensor.dtype


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _take_in_(mean: Tensor, name: str, pieces: Iterable[Tensor], first: int) -> None:
    """Make the `mean` of the members before the one numbered `first` that of all to the last of `pieces`."""
    infinite = None if _is_finite(mean) else mean.isinf()
    for number, piece in enumerate(pieces, first):
        piece = _as(mean.dtype, piece)
        equal = None if infinite is None else infinite & (piece == mean)
        # m - (m - x) / number, from a weight of 0.5 on: where x is m this is m, also -0.0; k * m / k is rounded twice.
        torch.lerp(piece, mean, 1 - 1 / number, out=mean)
        if equal is not None:
            mean[equal] = piece[equal]  # of two infinities this is NaN, and stays so where they differ
    if not _is_finite(mean):
        right = mean.isfinite() if infinite is None else mean.isfinite() | (infinite & mean.isinf())
        if not bool(right.all()):
            raise _diverged(name)


def _diverged(name: str) -> ValueError:
    return ValueError(f"The mean of {name!r} is not finite: a member has diverged. Leave it out.")


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a `to` that does nothing takes time too


def _is_finite(tensor: Tensor) -> bool:
    return math.isfinite(float(tensor.sum().abs())) or bool(tensor.isfinite().all())


def _write_mean_with_zeros_(out: Tensor, name: str, pieces: Iterable[Tensor], labels: Sequence[str]) -> None:
    """The mean of `pieces`, which have to be 0 at the same places."""
    kept = np.empty(len(out), dtype=np.bool_)
    found = np.empty_like(kept)  # written to again and again: a new array each time takes four times as long

    def alike() -> Iterator[Tensor]:
        for number, (label, piece) in enumerate(zip(labels, pieces, strict=True)):
            # Compared by NumPy, as a type that it has, in a third of the time of `torch.ne`.
            np.not_equal(_as(_mean_type(piece), piece).numpy(), 0, out=found if number else kept)
            if number and not equal_bools(found, kept):
                raise pruned_otherwise(name, labels[0], label, " If a kept weight is 0 by chance, give masks.")
            yield piece

    _write_mean_(out, name, alike())
    _zero_(out, torch.from_numpy(kept))


def _zero_(tensor: Tensor, kept: Tensor) -> None:
    """Set what is not kept to 0."""
    # As integers, the bits become those of +0.0 or stay; in a quarter of the time of `masked_fill_`.
    bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor[:, None]
    bits.view(_INTEGERS[bits.itemsize]).mul_(kept.view(torch.uint8)[:, None])


def _merge(name: str, pieces: Iterable[Tensor], size: int) -> Tensor:
    """The value of a stretch of a tensor of so many elements that has no mean."""
    first, *others = (piece.clone() for piece in pieces)
    if size == 1 and not all(torch.equal(first, other) for other in others):  # not all types of integers are ordered
        return torch.stack([first, *others]).amax(0)
    if not all(torch.equal(first, other) for other in others):
        raise ValueError(
            f"{name!r} is of {str(first.dtype).removeprefix('torch.')} and differs between members; such values have "
            "no mean. Average members of one network."
        )
    return first
