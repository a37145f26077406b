"""Which converted layers run on sparse kernels, decided by measuring, with a reason for every one."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from sparsetrain.ops import cusparselt, library
from sparsetrain.ops.layers import EffectiveConv2d, EffectiveLayer, effective_layers

GAIN = 1.05  # what a sparse layer must be faster by; less is within the noise of a step
_BACKENDS = ("auto", "reference", "cusparselt")
_ROUNDS, _CALLS = 9, 10


@dataclass(frozen=True)
class Decision:
    """Which backend a layer runs on, and why.

    Args:
        name: of the layer.
        backend: "reference" (masked weights in dense products) or "cusparselt".
        reason: why.
        dense_us: time of the dense products of one step, in microseconds; None if it was not measured.
        sparse_us: the same for the sparse ones, with the compression of the weights.
    """

    name: str
    backend: Literal["reference", "cusparselt"]
    reason: str
    dense_us: float | None = None
    sparse_us: float | None = None


def choose(
    module: nn.Module,
    backend: Literal["auto", "reference", "cusparselt"] = "auto",
    *,
    tokens: int | Mapping[str, int],
    dtype: torch.dtype,
) -> tuple[Decision, ...]:
    """Decide for each converted layer of `module`, and set its `backend`; call `refresh_` after it.

    With "auto" a layer that could run on sparse kernels is timed, both ways, and runs on them only if that is more
    than 5 % faster: the forward product and the input gradient, with the compression of the weights once per step. The
    weight gradient and the pruning are the same on both. Kernels run with their default algorithm; nothing is searched.

    Args:
        module: a module after `convert`.
        backend: "auto"; "reference" for dense products everywhere; "cusparselt" for sparse ones wherever they exist.
        tokens: rows of the input of a layer in one step (batch x positions), at least 1; for all, or by layer name.
        dtype: the compute dtype, torch.bfloat16 under "bf16-mixed".

    Returns:
        One row per converted layer.

    Raises:
        ValueError: another `backend`, or no tokens for a layer.
        RuntimeError: "cusparselt" where no layer can run on it; with the reasons.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {', '.join(map(repr, _BACKENDS))}.")
    layers = dict(effective_layers(module))
    decisions = []
    for name, layer in layers.items():
        decisions.append(_decide(name, layer, backend, _tokens_of(name, tokens), dtype))
    if backend == "cusparselt" and all(decision.backend == "reference" for decision in decisions):
        reasons = "; ".join(sorted({decision.reason for decision in decisions})) or "no layer is converted"
        raise RuntimeError(f"backend='cusparselt' cannot run here: {reasons}. Use backend='auto' or 'reference'.")
    for decision in decisions:
        layer = layers[decision.name]
        layer.backend = decision.backend
        layer.forget()
    return tuple(decisions)


def obstacle(layer: EffectiveLayer, dtype: torch.dtype) -> str | None:
    """Why `layer` cannot run on sparse kernels in `dtype`, or None if it can."""
    if reason := cusparselt.probe(dtype, layer.weight.device):
        return reason
    if not cusparselt.holds(layer.rule.n, layer.rule.m):
        return f"{layer.rule.n}:{layer.rule.m} is not a subset of 2:4"
    if isinstance(layer, EffectiveConv2d):
        if layer.kernel_size != (1, 1):
            return f"a {layer.kernel_size[0]}x{layer.kernel_size[1]} kernel: unfolding costs more than 2:4 can gain"
        if layer.groups > 1:
            return "grouped convolution"
        if layer.padding not in ((0, 0), "valid", "same"):
            return "padding around a 1x1 kernel"
    return cusparselt.obstacle(layer.weight.flatten(1).shape)


def _tokens_of(name: str, tokens: int | Mapping[str, int]) -> int:
    count = tokens if isinstance(tokens, int) else tokens.get(name, 0)
    if count < 1:
        raise ValueError(f"tokens of layer {name!r} are {count}; they must be at least 1: batch x positions of a step.")
    return count


def _decide(name: str, layer: EffectiveLayer, backend: str, tokens: int, dtype: torch.dtype) -> Decision:
    if backend == "reference":
        return Decision(name, "reference", "asked for")
    if reason := obstacle(layer, dtype):
        return Decision(name, "reference", reason)
    if backend == "cusparselt":
        return Decision(name, "cusparselt", "asked for")
    dense_us, sparse_us = _time_us(layer, tokens, dtype)
    gain = dense_us / sparse_us
    text = f"{gain:.2f} times as fast as dense at {tokens} tokens"
    if gain > GAIN:
        return Decision(name, "cusparselt", text, dense_us, sparse_us)
    return Decision(name, "reference", f"sparse would be {text}; more than {GAIN:.2f} is asked", dense_us, sparse_us)


@torch.no_grad()
def _time_us(layer: EffectiveLayer, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """Dense and sparse time of one step's forward product and input gradient, medians of interleaved rounds."""
    weight = layer.weight.detach().flatten(1)
    out, inner = weight.shape
    n, m, sparse_backward = layer.rule.n, layer.rule.m, layer.rule.backward != "dense"
    forward, backward_t = library.prune_dual_t(weight, n, m, dtype)
    backward = backward_t.t().contiguous()
    x = torch.randn(tokens, inner, dtype=dtype, device=weight.device)
    g = torch.randn(tokens, out, dtype=dtype, device=weight.device)

    def dense() -> None:
        F.linear(x, forward)
        g @ backward

    def sparse() -> None:
        library.spmm(library.compress(forward), x, None)
        if sparse_backward:
            library.spmm(library.compress(backward_t), g, None)
        else:
            g @ backward

    rounds = [(_event_us(dense), _event_us(sparse)) for _ in range(_ROUNDS + 2)][2:]  # the first two warm up
    return statistics.median(pair[0] for pair in rounds), statistics.median(pair[1] for pair in rounds)


def _event_us(call: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms * 1000 / _CALLS
