"""The n largest of every m neighbours, by one rule on every device, without sorting.

Ranks come from pairwise comparisons of whole planes (the first of every group, the second of every group, ...), summed
eight at a time as the bytes of an int64.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 3 << 18  # elements: few enough for the cache, enough to hide what a call costs

_ONES = 0x0101010101010101
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def check_nm(n: int, m: int) -> None:
    """Refuse group sizes that make no sense.

    Raises:
        ValueError: unless 1 <= n < m <= 64.
    """
    if not 1 <= n < m <= 64:
        raise ValueError(
            f"n={n} of m={m} must satisfy 1 <= n < m <= 64. Common choices: 2 of 4, 1 of 4, 2 of 8, 4 of 8."
        )


def magnitude_bits(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The bit patterns of |weight| as integers of the same width and shape: a total order, NaN above infinity.

    Args:
        weight: any shape.
        out: where to write them, or None.

    Raises:
        ValueError: a dtype other than float64, float32, float16 or bfloat16.
    """
    integer = bits_dtype(weight.dtype)
    return torch.bitwise_and(weight.view(integer), torch.iinfo(integer).max, out=out)


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The signed integer type as wide as `dtype`.

    Raises:
        ValueError: not a floating dtype of 16, 32 or 64 bits.
    """
    if dtype not in _BITS:
        raise ValueError(f"N:M masks rank {', '.join(map(str, _BITS))}; got {dtype}. Cast the weight to one of these.")
    return _BITS[dtype]


def keep_largest(keys: Tensor, n: int, m: int, axis: int) -> Tensor:
    """True at the `n` largest of every `m` consecutive places along `axis`; among equals the lower index wins.

    rank_i = #{j in the group: key_j > key_i, or key_j == key_i and j < i}; kept are the ranks below n.

    Args:
        keys: any shape whose size along `axis` is divisible by m; integers, or floats without NaN.
        n: kept per group, 1 <= n < m.
        m: size of a group, at most 64.
        axis: the dimension along which groups run, at fixed places of all others; not negative.

    Returns:
        Bool mask of the same shape and memory format: exactly n True in every group.

    >>> keep_largest(torch.tensor([[3, 1, 3, 3, 0, 0, 0, 0]]), 2, 4, axis=1).int()
    tensor([[1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    mask = torch.empty_like(keys, dtype=torch.bool)
    (keys, kept), axis = in_memory_order([keys, mask], axis)
    for rows in chunks(keys, m):
        keep_largest_(kept[rows], keys[rows], n, m, axis)
    return mask


def keep_largest_(mask: Tensor, keys: Tensor, n: int, m: int, axis: int) -> None:
    """`keep_largest` of one chunk, written into the bool tensor `mask`; fastest if both are contiguous."""
    planes = _split_groups(keys, m, axis)
    shape, size = planes.shape[1:], planes[0].numel()
    words = math.ceil(size / 8)
    ranks = scratch("ranks", (m, words), torch.int64, keys.device)
    beats = scratch("beats", (m, words), torch.int64, keys.device)
    if size % 8:
        beats[:, -1].zero_()  # bytes beyond the last place
    beats_as_bool = beats.view(torch.bool)[:, :size].view(m, *shape)
    rank, beat, plane = ranks.unbind(), beats.unbind(), planes.unbind()
    for i in range(m):
        rank[i].fill_(i * _ONES)
    for i in range(m - 1):
        # rank_i counts the later places that are larger; rank_j starts at j, less the earlier places that it beats.
        torch.gt(planes[i + 1 :], plane[i], out=beats_as_bool[i + 1 :])
        ranks[i + 1 :].sub_(beats[i + 1 :])
        for j in range(i + 1, m):
            rank[i].add_(beat[j])
    # A byte of rank + 128 - n has its highest bit set where the rank is n or more: no byte overflows into the next.
    ranks.add_((128 - n) * _ONES).bitwise_right_shift_(7).bitwise_and_(_ONES).bitwise_xor_(_ONES)
    kept = ranks.view(torch.bool)[:, :size].view(m, *shape)
    _split_groups(mask, m, axis).copy_(kept)


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor that is overwritten by the thread's next `scratch` of that name.

    On a CPU its memory stays allocated, a few MB for chunks, and is not faulted in again for every weight.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size_bytes = math.prod(shape) * dtype.itemsize
    buffer = _buffers.named.get(name)
    if buffer is None or len(buffer) < size_bytes:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            buffer = torch.empty(size_bytes, dtype=torch.uint8)
        if size_bytes <= 8 * CHUNK and type(buffer) is Tensor:  # not one of FakeTensorMode
            _buffers.named[name] = buffer
    return buffer[:size_bytes].view(dtype).view(shape)


def _split_groups(tensor: Tensor, m: int, axis: int) -> Tensor:
    """[m, ..., groups, ...]: a view whose first dimension is the place in the group."""
    shape = (*tensor.shape[:axis], -1, m, *tensor.shape[axis + 1 :])
    return tensor.view(shape).movedim(axis + 1, 0)


def in_memory_order(tensors: list[Tensor], axis: int) -> tuple[list[Tensor], int]:
    """Views of equally strided tensors with the largest stride first, and where `axis` is now."""
    strides = tensors[0].stride()
    order = sorted(range(tensors[0].dim()), key=lambda dim: -strides[dim])
    return [tensor.permute(order) for tensor in tensors], order.index(axis)


def chunks(tensor: Tensor, m: int) -> list[slice]:
    """Slices of the first dimension, multiples of `m` rows of about CHUNK elements; one slice on an accelerator."""
    rows = len(tensor)
    if tensor.device.type != "cpu":
        return [slice(0, rows)]
    row = max(tensor.numel() // max(rows, 1), 1)
    step = max(CHUNK // (row * m), 1) * m
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
