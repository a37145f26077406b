"""Which layers hold an N:M pattern, and 2:4 weights for sparse kernels."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from sparsetrain.choices import check_choice
from sparsetrain.nm import check_nm as check_sizes
from sparsetrain.ops import cusparselt
from sparsetrain.ops.layers import effective_layers

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AXES = {"input": 1, "output": 0}


@dataclass(frozen=True)
class ExportRow:
    """What was found or done for the weight of one layer.

    Args:
        name: of the parameter.
        shape: its shape.
        accepted: whether it holds the pattern, or was converted.
        reason: why not; empty if accepted.
    """

    name: str
    shape: tuple[int, ...]
    accepted: bool
    reason: str


def check_nm(
    model: nn.Module, n: int = 2, m: int = 4, *, axis: Literal["input", "output"] = "input"
) -> tuple[ExportRow, ...]:
    """Look whether at most `n` of every `m` neighbours are not zero, in every linear and convolution layer.

    Args:
        model: any module; a layer that still computes with effective weights does not hold the pattern: fold it first.
        n: may be kept per group.
        m: size of a group.
        axis: along which groups run, at fixed places of all others; "input" is that of the forward product.

    Returns:
        One row per layer, in the order of `named_modules`. Whatever the layers hold, nothing is raised.

    Raises:
        ValueError: `n`, `m` or `axis` have no meaning.
    """
    check_sizes(n, m)
    check_choice(axis, "axis", _AXES)
    effective = {layer for _, layer in effective_layers(model)}
    rows = []
    for name, layer in _layers(model):
        if layer in effective:
            reason = "holds the dense master of effective weights; call ops.fold first"
        else:
            reason = _broken(layer, n, m, axis)
        rows.append(_row(name, layer.weight, reason))
    return tuple(rows)


def to_semi_structured(model: nn.Module) -> tuple[ExportRow, ...]:
    """Compress 2:4 weights of linear layers in place, for inference through torch's sparse kernels on a GPU.

    A compressed weight is a tensor of `torch.sparse.to_sparse_semi_structured`: it has no gradient, and does not load
    into the plain model; save that before. Each is multiplied out once, and must be what it was made of.

    Args:
        model: on a GPU, in bfloat16 or float16.

    Returns:
        One row per linear and convolution layer: whether it was compressed, and if not, why it stays dense.

    Raises:
        RuntimeError: no layer can run on the kernels, with the reasons, or one that should gives other numbers. The
            model is as before.
    """
    rows, compressed = [], []
    for row, (name, layer) in zip(check_nm(model), _layers(model), strict=True):
        reason = row.reason or _obstacle(model, name, layer)
        if not reason:
            compressed.append((layer, _compress(row.name, layer.weight.detach())))
        rows.append(_row(name, layer.weight, reason))
    if not compressed:
        reasons = "; ".join(sorted({row.reason for row in rows})) or "it has no linear layer"
        raise RuntimeError(f"No layer of {type(model).__name__} can run on 2:4 kernels: {reasons}. Keep it dense.")
    for layer, weight in compressed:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return tuple(rows)


def _layers(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _LAYERS)]


def _row(owner: str, weight: Tensor, reason: str) -> ExportRow:
    name = f"{owner}.weight" if owner else "weight"
    return ExportRow(name, tuple(weight.shape), not reason, reason)


def _broken(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, n: int, m: int, axis: str) -> str:
    """Why the weight of `layer` does not hold the pattern, or an empty text."""
    weight, dim, parts = layer.weight.detach(), _AXES[axis], getattr(layer, "groups", 1)
    size = weight.shape[dim] // (parts if axis == "output" else 1)
    if size % m:
        return f"{size} {axis} channels{' per group' if parts > 1 else ''} are not divisible by {m}"
    kept = torch.unflatten(weight != 0, dim, (-1, m)).sum(dim + 1)  # NaN is not zero
    full = int((kept > n).sum())
    return f"{full:,} of {kept.numel():,} groups have more than {n} of {m} weights" if full else ""


def _obstacle(model: nn.Module, name: str, layer: nn.Module) -> str:
    """Why a layer with 2:4 weights stays dense, or an empty text."""
    if type(layer) is not nn.Linear:
        return f"torch multiplies compressed weights in layers of exactly nn.Linear, not in {type(layer).__name__}"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return "nn.TransformerEncoderLayer's fast path skips the layer: torch.backends.mha.set_fastpath_enabled(False)"
    weight = layer.weight
    if sum(other is weight for _, other in model.named_parameters(remove_duplicate=False)) > 1:
        return "tied to another parameter"
    if reason := cusparselt.probe(weight.dtype, weight.device) or cusparselt.obstacle(weight.shape):
        return reason
    if not weight.is_contiguous():
        return "its weight is not contiguous"
    return "" if weight.isfinite().all() else "it has infinite or NaN weights"


def _compress(name: str, weight: Tensor) -> Tensor:
    try:
        compressed = to_sparse_semi_structured(weight)
        same = torch.equal(compressed.to_dense(), weight)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RuntimeError(f"torch cannot run {name!r} on 2:4 kernels here: {error}. Keep the model dense.") from error
    if not same:
        raise RuntimeError(
            f"The compressed {name!r} is not the dense one: the 2:4 kernels of torch {torch.__version__} are wrong "
            "on this GPU. Keep the model dense."
        )
    return compressed
