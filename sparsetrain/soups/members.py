"""What is averaged: state dicts in memory or in files, read a stretch at a time, and the masks that they share."""

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsetrain.mask_files import load_masks

Member = Mapping[str, Tensor] | str | Path
"""A state dict, or a safetensors file that holds one."""

MemberMasks = Mapping[str, Tensor] | str | Path
"""Parameter name -> bool tensor, True = kept; or a file of `save_masks`."""

Kind = tuple[torch.Size, torch.dtype]

AT_ONCE = 1 << 18  # weights that are read at once: what is added up stays in the cache
MAPPED = 1 << 25  # bytes of all files together that are mapped into memory at once
COUNT = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _State:
    """A state dict to be read in parts."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self.kinds: dict[str, Kind] = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._tensors = tensors
        self._name, self._flat = "", torch.empty(0)

    def read(self, name: str, part: slice) -> Tensor:
        """The weights in `part` of the tensor `name`, row-major."""
        if name != self._name:
            plain = self._tensors[name].detach().resolve_conj().resolve_neg()  # which NumPy has no notion of
            self._name, self._flat = name, plain.reshape(-1)  # may copy; once a tensor
        return self._flat[part].cpu()


class _File:
    """A safetensors file to be read in parts.

    The format: 8 bytes with the length of the header, the header in JSON, the tensors.

    Args:
        path: where it is.
        mapped: bytes that stay mapped into memory from one reading to the next.
        like: another file; if their headers are equal, it is not parsed again.
    """

    def __init__(self, path: str | Path, mapped: int, like: "_File | None" = None) -> None:
        self.label, self._path, self._mapped = str(path), Path(path), mapped
        try:
            with safe_open(path, framework="pt"):
                pass  # checks the header and the size
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}). Write it with save_file.") from None
        with self._path.open("rb") as file:
            self._header = file.read(int.from_bytes(file.read(8), "little"))
        self.kinds: dict[str, Kind]
        self._starts: dict[str, int]
        if like is not None and self._header == like._header:
            self.kinds, self._starts = like.kinds, like._starts
            return
        header = json.loads(self._header)
        header.pop("__metadata__", None)
        strange = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
        if strange:
            raise ValueError(f"{path} holds tensors of type {strange[0]}. Convert them to one of {', '.join(_DTYPES)}.")
        self.kinds = {name: (torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]) for name, entry in header.items()}
        self._starts = {name: 8 + len(self._header) + entry["data_offsets"][0] for name, entry in header.items()}

    def __enter__(self) -> Self:
        self._file = self._path.open("rb", buffering=0)
        self._size = self._path.stat().st_size
        self._window, self._first = memoryview(b""), 0
        return self

    def __exit__(self, *_: object) -> None:
        self._window = memoryview(b"")
        self._file.close()

    def read(self, name: str, part: slice) -> Tensor:
        """The weights in `part` of the tensor `name`, row-major, not to be written to."""
        dtype, count = self.kinds[name][1], part.stop - part.start
        start = self._starts[name] + part.start * dtype.itemsize
        window, first = self._around(start, start + count * dtype.itemsize)
        return torch.frombuffer(window, dtype=dtype, count=count, offset=start - first)

    def _around(self, start: int, end: int) -> tuple[memoryview, int]:
        """Bytes of the file that hold those from `start` to `end`, and where they begin; unmapped with the last use."""
        if self._first <= start and end <= self._first + len(self._window):
            return self._window, self._first
        first = start - start % mmap.ALLOCATIONGRANULARITY
        length = min(max(end - first, self._mapped), self._size - first)
        try:
            window = memoryview(mmap.mmap(self._file.fileno(), length, offset=first, access=mmap.ACCESS_COPY))
        except ValueError:
            raise ValueError(
                f"{self.label} became shorter while it was read. Replace files, do not write to them."
            ) from None
        if length <= self._mapped:
            self._window, self._first = window, first
        return window, first


@contextmanager
def opened(members: Sequence[Member]) -> Iterator[list[_State | _File]]:
    """The members as what can be read in parts; files are closed afterwards.

    Raises:
        ValueError: no members, one alone in the place of a list, or a file that is no whole safetensors file.
    """
    if isinstance(members, Mapping | str | Path):
        raise ValueError("The members of a soup are a list of state dicts or files; this is one of them.")
    if not members:
        raise ValueError("A soup has at least one member; there is none.")
    sources: list[_State | _File] = []
    with ExitStack() as stack:
        for number, member in enumerate(members):
            if isinstance(member, Mapping):
                sources.append(_State(member, f"member {number}"))
            else:
                like = next((source for source in sources if isinstance(source, _File)), None)
                sources.append(stack.enter_context(_File(member, MAPPED // len(members), like)))
        yield sources


def common_kinds(sources: Sequence[_State | _File]) -> dict[str, Kind]:
    """Name -> shape and type, which all members share.

    Raises:
        ValueError: they do not.
    """
    first = sources[0]
    for source in sources[1:]:
        for name in [*first.kinds, *source.kinds]:
            one, other = first.kinds.get(name), source.kinds.get(name)
            if one != other:
                raise ValueError(
                    f"{name!r} is {_told(one)} in {first.label} and {_told(other)} in {source.label}. Average members "
                    "of one architecture, saved alike."
                )
    return first.kinds


def _told(kind: Kind | None) -> str:
    return "missing" if kind is None else f"{tuple(kind[0])} {str(kind[1]).removeprefix('torch.')}"


def common_masks(
    masks: Sequence[MemberMasks], kinds: Mapping[str, Kind], labels: Sequence[str]
) -> Mapping[str, Tensor]:
    """The masks that all members share; two of them are in memory at a time.

    Args:
        masks: of each member.
        kinds: of the members' tensors.
        labels: of the members, for errors.

    Raises:
        ValueError: they do not share them, or a mask fits no tensor.
    """
    if len(masks) != len(labels):
        raise ValueError(f"There are {len(labels)} members and masks of {len(masks)}. Give those of each member.")
    first = _masks(masks[0])
    for name, mask in first.items():
        if name not in kinds or kinds[name][0] != mask.shape:
            raise ValueError(
                f"The mask of {name!r} has shape {tuple(mask.shape)}; the tensor is {_told(kinds.get(name))}. Give the "
                "masks of the same module, under the names of its state dict."
            )
    content = _content(masks[0])
    for label, given in zip(labels[1:], masks[1:], strict=True):
        if content is not None and content == _content(given):
            continue
        other = _masks(given)
        for name in [*first, *other]:
            if name not in first or name not in other or not _equal(first[name], other[name]):
                raise pruned_otherwise(name, labels[0], label)
    return first


def _masks(masks: MemberMasks) -> Mapping[str, Tensor]:
    return masks if isinstance(masks, Mapping) else load_masks(masks)


def _content(masks: MemberMasks) -> bytes | None:
    """The bytes of a file; where they are equal, masks need not be unpacked."""
    return None if isinstance(masks, Mapping) else Path(masks).read_bytes()


def _equal(one: Tensor, other: Tensor) -> bool:
    flat = (mask.cpu().reshape(-1).numpy() for mask in (one, other))
    return one is other or (one.shape == other.shape and equal_bools(*flat))


def equal_bools(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> bool:
    """Are two arrays [N] equal? In less than a tenth of the time of `torch.equal`."""
    words = len(one) // 8 * 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )


def pruned_otherwise(name: str, one: str, other: str, remedy: str = "") -> ValueError:
    """The error that the members labelled `one` and `other` have different masks."""
    return ValueError(
        f"{name!r} is pruned in {other} at other places than in {one}: their mean would be denser than both. Average "
        f"members that were retrained from one pruned network.{remedy}"
    )


def parts(total: int) -> Iterator[slice]:
    """Stretches of `total` weights that are read at once."""
    return (slice(start, min(start + AT_ONCE, total)) for start in range(0, total, AT_ONCE))
