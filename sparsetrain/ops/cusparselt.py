"""2:4 products on sparse tensor cores through cuSPARSELt: the only file that calls torch's private functions for it.

torch checks almost nothing there: a transposed view, a misaligned pointer or a weight that is not 2:4 gives wrong
numbers without an error. Every call here is guarded for that. Algorithms other than the default one may be faster, and
some of them are wrong (pytorch/pytorch#155333): `search` finds out.
"""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
_ROWS_OF_WEIGHT, _TOKENS, _POINTER = 16, 8, 16  # multiples that 16-bit kernels need; the pointer's in bytes


@dataclass(frozen=True)
class Algorithms:
    """cuSPARSELt's numbers for the two sparse products of a layer; for another number of tokens they may be wrong.

    Args:
        tokens: rows of the input for which they were found.
        forward: of y = x @ W_f^T + b; 0 is the default one.
        backward: of dx = g @ W_b.
    """

    tokens: int
    forward: int = 0
    backward: int = 0

    def at(self, tokens: int) -> tuple[int, int]:
        """Those for an input of `tokens` rows: the default ones if it is another number."""
        return (self.forward, self.backward) if tokens == self.tokens else (0, 0)


def probe(dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None) -> str | None:
    """Why 2:4 products cannot run here in `dtype`, or None if they can."""
    if dtype not in DTYPES:
        return f"2:4 kernels compute in bfloat16 or float16, not in {dtype}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device is not None and device.type != "cuda":
        return f"the layer is on {device}, not on a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} has no sparse tensor cores; 8.0 is needed"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    missing = [name for name in ("_cslt_compress", "_cslt_sparse_mm") if not hasattr(torch, name)]
    return f"torch {torch.__version__} has no torch.{missing[0]}" if missing else None


def version() -> str | None:
    """The version of the cuSPARSELt library that is loaded, as "0.8.1"; None if there is none.

    torch only knows the version that it was built with.
    """
    try:
        library = ctypes.CDLL("libcusparseLt.so.0")  # by this name the loader gives what torch has loaded
    except OSError:
        return None
    value, parts = ctypes.c_int(), []
    for part in range(3):  # major, minor, patch
        if library.cusparseLtGetProperty(part, ctypes.byref(value)):
            return None
        parts.append(str(value.value))
    return ".".join(parts)


def holds(n: int, m: int) -> bool:
    """Whether every n:m pattern is also 2:4: no four aligned neighbours hold more than two."""
    return (n <= 2 and m % 4 == 0) or (n, m) == (1, 2)


def obstacle(shape: torch.Size) -> str | None:
    """Why a weight matrix of `shape` has no 2:4 kernel in one of its directions, or None if it has both."""
    for name, size in zip(("output", "input"), shape, strict=True):
        if size % _ROWS_OF_WEIGHT:
            return f"2:4 kernels need sizes divisible by {_ROWS_OF_WEIGHT}; the {name} has {size}"
    return None


def compress(pruned: Tensor) -> Tensor:
    """The values and indices of a 2:4 matrix, as cuSPARSELt wants them.

    Args:
        pruned: [rows, k], contiguous, at most 2 of every 4 neighbours in a row not 0; both sizes divisible by 16.

    Returns:
        [rows, 9 * k / 16], opaque, of the same dtype.
    """
    if pruned.dim() != 2 or not pruned.is_contiguous():
        raise ValueError(f"compress needs a contiguous matrix; got strides {pruned.stride()}. Call .contiguous().")
    reason = probe(pruned.dtype, pruned.device) or obstacle(pruned.shape)
    if reason:
        raise ValueError(f"cuSPARSELt cannot compress this weight: {reason}. Use backend='reference'.")
    if pruned.data_ptr() % _POINTER:
        pruned = pruned.clone()
    compressed: Tensor = torch._cslt_compress(pruned)
    if compressed.shape != compressed_shape(pruned.shape):
        raise RuntimeError(
            f"cuSPARSELt compressed {tuple(pruned.shape)} to {tuple(compressed.shape)}, not to "
            f"{tuple(compressed_shape(pruned.shape))}: its format has changed. Use backend='reference'."
        )
    return compressed


def compressed_shape(shape: torch.Size) -> torch.Size:
    """Half of the values, and 2 bits for the place of each: 9/16 of a 16-bit row."""
    return torch.Size((shape[0], shape[1] * 9 // 16))


def matmul(compressed: Tensor, x: Tensor, bias: Tensor | None, *, algorithm: int = 0) -> Tensor:
    """The product x @ A^T + bias for a compressed A.

    Args:
        compressed: of A [rows, k].
        x: [tokens, k], of the same dtype, any strides; any number of tokens (filled up with zeros to a multiple of 8).
        bias: [rows] or None.
        algorithm: cuSPARSELt's number for it, at least 0; take others than 0 from `search.best_algorithm` only.

    Returns:
        [tokens, rows], contiguous unless it was filled up.
    """
    tokens, k = x.shape
    if compressed.dtype != x.dtype or compressed.shape[1] != k * 9 // 16:
        raise ValueError(
            f"x [{tokens}, {k}] of {x.dtype} does not fit a compressed {tuple(compressed.shape)} of {compressed.dtype}."
        )
    if tokens == 0:
        return x.new_empty(0, compressed.shape[0])
    if tokens % _TOKENS:  # `pad` copies, also where there is nothing to add
        x = F.pad(x, (0, 0, 0, -tokens % _TOKENS))
    x = x.contiguous()
    if x.data_ptr() % _POINTER:
        x = x.clone()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    # A non-contiguous operand is taken for the transpose of a contiguous one, which x.t() is: k >= 16, tokens >= 8.
    # No alpha: it would synchronize with the host.
    y: Tensor = torch._cslt_sparse_mm(compressed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:tokens]
