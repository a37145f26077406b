"""Which converted layers run on sparse kernels, decided by measuring, with a reason for every one."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.choices import check_choice
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

    def __str__(self) -> str:
        times = "" if self.dense_us is None else f"; {self.dense_us:.1f} us dense, {self.sparse_us:.1f} us sparse"
        return f"{self.name}: {self.backend} ({self.reason}{times})"


def check_backend(backend: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
    """Raise if `backend` is unknown, or cannot run whatever the layers.

    Args:
        backend: "auto", "reference" or "cusparselt".
        dtype: the compute dtype; None looks at the name alone.
        device: where the layers will be.

    Raises:
        ValueError: with the reason and the remedy.
    """
    check_choice(backend, "backend", _BACKENDS)
    if backend == "cusparselt" and dtype is not None and (reason := cusparselt.probe(dtype, device)):
        raise _cannot_run(reason)


def to_time(module: nn.Module, backend: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The layers whose tokens `choose` needs: with "auto" those that could run on sparse kernels, else none."""
    if backend != "auto":
        return ()
    return tuple(name for name, layer in effective_layers(module) if obstacle(layer, dtype) is None)


def tokens_of(layer: EffectiveLayer, x: Tensor) -> int:
    """Rows of the product of `layer` with the input `x`: batch x positions, of a 1x1 convolution those it puts out."""
    if isinstance(layer, EffectiveConv2d):
        rows, columns = layer.stride
        return x[..., ::rows, ::columns].numel() // layer.in_channels
    return x.numel() // layer.in_features


def choose(
    module: nn.Module,
    backend: Literal["auto", "reference", "cusparselt"] = "auto",
    *,
    tokens: int | Mapping[str, int],
    dtype: torch.dtype,
) -> tuple[Decision, ...]:
    """Decide for each converted layer of `module`, and set its `backend`; call `refresh_` after it.

    With "auto" a layer that could run on sparse kernels is timed, both ways, and runs on them only if that is more
    than 5 % faster: the forward product and the input gradient, with one compression of the weights. The weight
    gradient and the pruning are the same on both. Kernels run with their default algorithm; nothing is searched. The
    compression is charged to one call; a layer that is called several times in a step gains more than is measured.

    Args:
        module: a module after `convert`.
        backend: "auto"; "reference" for dense products everywhere; "cusparselt" for sparse ones wherever they exist.
        tokens: rows of the input of a layer in one call (batch x positions), at least 1; for all, or by layer name.
            A layer without any stays on the reference.
        dtype: the compute dtype, torch.bfloat16 under "bf16-mixed".

    Returns:
        One row per converted layer.

    Raises:
        ValueError: another `backend`, fewer than one token, or "cusparselt" where no layer can run on it.
    """
    check_backend(backend)
    if isinstance(tokens, int) and tokens < 1:
        raise ValueError(f"tokens are {tokens}; they must be at least 1: batch x positions of a call.")
    times: dict[tuple[int, ...], tuple[float, float]] = {}  # layers of one shape are timed once
    decisions = []
    for name, layer in effective_layers(module):
        count = tokens if isinstance(tokens, int) else tokens.get(name, 0)
        decisions.append(_decide(name, layer, backend, count, dtype, times))
    if backend == "cusparselt" and all(decision.backend == "reference" for decision in decisions):
        raise _cannot_run("; ".join(sorted({decision.reason for decision in decisions})) or "no layer is converted")
    assign(module, decisions)
    return tuple(decisions)


def assign(module: nn.Module, decisions: Iterable[Decision]) -> None:
    """Let the converted layers of `module` run as decided, perhaps by another process; call `refresh_` after it."""
    layers = dict(effective_layers(module))
    for decision in decisions:
        layers[decision.name].backend = decision.backend
        layers[decision.name].forget()


def describe(decisions: Sequence[Decision]) -> str:
    """A line for each layer; one line if it is the same for all."""
    anonymous = {replace(decision, name=f"all {len(decisions)} layers") for decision in decisions}
    return "\n".join(map(str, anonymous if len(anonymous) == 1 < len(decisions) else decisions))


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


def _cannot_run(reason: str) -> ValueError:
    return ValueError(f"backend='cusparselt' cannot run here: {reason}. Use backend='auto' or 'reference'.")


def _decide(
    name: str,
    layer: EffectiveLayer,
    backend: str,
    tokens: int,
    dtype: torch.dtype,
    times: dict[tuple[int, ...], tuple[float, float]],
) -> Decision:
    if backend == "reference":
        return Decision(name, "reference", "asked for")
    if reason := obstacle(layer, dtype):
        return Decision(name, "reference", reason)
    if backend == "cusparselt":
        return Decision(name, "cusparselt", "asked for")
    if not tokens:
        return Decision(name, "reference", "not called in the first step")
    shape = (*layer.weight.shape[:2], tokens)
    try:
        if shape not in times:
            times[shape] = _time_us(layer, tokens, dtype)
    except RuntimeError as error:
        return Decision(name, "reference", f"its 2:4 kernels failed at {tokens} tokens: {error}")
    dense_us, sparse_us = times[shape]
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
    sparse_backward = layer.rule.backward != "dense"
    forward, backward_t = library.prune_dual_t(weight, 2, 4, dtype)  # kernels take no notice of more zeros
    backward = backward_t.t().contiguous()
    stream = torch.Generator(weight.device).manual_seed(0)  # the run's own stream must stay where it is
    x = torch.randn(tokens, inner, dtype=dtype, device=weight.device, generator=stream)
    g = torch.randn(tokens, out, dtype=dtype, device=weight.device, generator=stream)

    def dense() -> None:
        F.linear(x, forward)
        g @ backward

    def sparse() -> None:
        library.spmm(library.compress(forward), x, None)
        if sparse_backward:
            library.spmm(library.compress(backward_t), g, None)
        else:
            g @ backward

    rounds = [(event_us(dense), event_us(sparse)) for _ in range(_ROUNDS + 2)][2:]  # the first two warm up
    return statistics.median(pair[0] for pair in rounds), statistics.median(pair[1] for pair in rounds)


def event_us(call: Callable[[], object]) -> float:
    """Microseconds of a call on the current CUDA device, the mean of several."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms * 1000 / _CALLS
