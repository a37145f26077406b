"""Which converted layers run on sparse kernels, decided by measuring, with a reason for every one."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.choices import check_choice
from sparsetrain.ops import cusparselt, library, search
from sparsetrain.ops.cusparselt import Algorithms
from sparsetrain.ops.layers import EffectiveConv2d, EffectiveLayer, effective_layers
from sparsetrain.ops.timing import event_us

GAIN = 1.05  # what a sparse layer must be faster by; less is within the noise of a step
_BACKENDS = ("auto", "reference", "cusparselt")
_ROUNDS = 9


@dataclass(frozen=True)
class Decision:
    """Which backend a layer runs on, and why.

    Args:
        name: of the layer.
        backend: "reference" (masked weights in dense products) or "cusparselt".
        reason: why.
        dense_us: time of the dense products of one step, in microseconds; None if it was not measured.
        sparse_us: the same for the sparse ones, with the compression of the weights.
        algorithms: of the sparse products; None: the default ones.
    """

    name: str
    backend: Literal["reference", "cusparselt"]
    reason: str
    dense_us: float | None = None
    sparse_us: float | None = None
    algorithms: Algorithms | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """That of which `dataclasses.asdict` made `state`."""
        found = state["algorithms"]
        return cls(**{**state, "algorithms": None if found is None else Algorithms(**found)})

    def __str__(self) -> str:
        times = "" if self.dense_us is None else f"; {self.dense_us:.1f} us dense, {self.sparse_us:.1f} us sparse"
        found = self.algorithms
        numbers = "" if found is None else f"; algorithms {found.forward} and {found.backward}"
        return f"{self.name}: {self.backend} ({self.reason}{times}{numbers})"


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


def to_time(module: nn.Module, backend: str, dtype: torch.dtype, *, searches: bool = False) -> tuple[str, ...]:
    """The layers whose tokens `choose` needs: those that could run on sparse kernels, where something is timed."""
    if backend != "auto" and not (searches and backend == "cusparselt"):
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
    cache: search.Cache | None = None,
) -> tuple[Decision, ...]:
    """Decide for each converted layer of `module`, and set its `backend`; call `refresh_` after it.

    With "auto" a layer that could run on sparse kernels is timed, both ways, and runs on them only if that is more
    than 5 % faster: the forward product and the input gradient, with one compression of the weights. The weight
    gradient and the pruning are the same on both. The compression is charged to one call; a layer that is called
    several times in a step gains more than is measured.

    Args:
        module: a module after `convert`.
        backend: "auto"; "reference" for dense products everywhere; "cusparselt" for sparse ones wherever they exist.
        tokens: rows of the input of a layer in one call (batch x positions), at least 1; for all, or by layer name.
            A layer without any stays on the reference.
        dtype: the compute dtype, torch.bfloat16 under "bf16-mixed".
        cache: of algorithms; with it the fastest correct ones are searched, which takes some seconds for each shape
            that is not in it, and used for inputs of just so many tokens. None: the default ones everywhere.

    Returns:
        One row per converted layer.

    Raises:
        ValueError: another `backend`, fewer than one token, or "cusparselt" where no layer can run on it.
    """
    check_backend(backend)
    if isinstance(tokens, int) and tokens < 1:
        raise ValueError(f"tokens are {tokens}; they must be at least 1: batch x positions of a call.")
    times: dict[tuple[int, ...], Decision] = {}  # layers of one shape are timed once
    decisions = []
    for name, layer in effective_layers(module):
        count = tokens if isinstance(tokens, int) else tokens.get(name, 0)
        decisions.append(_decide(name, layer, backend, count, dtype, cache, times))
    if backend == "cusparselt" and all(decision.backend == "reference" for decision in decisions):
        raise _cannot_run("; ".join(sorted({decision.reason for decision in decisions})) or "no layer is converted")
    assign(module, decisions)
    return tuple(decisions)


def assign(module: nn.Module, decisions: Iterable[Decision]) -> None:
    """Let the converted layers of `module` run as decided, perhaps by another process; call `refresh_` after it."""
    layers = dict(effective_layers(module))
    for decision in decisions:
        layers[decision.name].backend, layers[decision.name].algorithms = decision.backend, decision.algorithms
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
    cache: search.Cache | None,
    measured: dict[tuple[int, ...], Decision],
) -> Decision:
    if backend == "reference":
        return Decision(name, "reference", "asked for")
    if reason := obstacle(layer, dtype):
        return Decision(name, "reference", reason)
    if backend == "cusparselt" and (cache is None or not tokens):
        return Decision(name, "cusparselt", "asked for")
    if not tokens:
        return Decision(name, "reference", "not called in the first step")
    shape = (*layer.weight.shape[:2], tokens, layer.bias is not None)
    if shape not in measured:
        device = layer.weight.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                measured[shape] = _measure(layer, backend, tokens, dtype, cache)
        except (RuntimeError, OSError) as error:
            measured[shape] = Decision("", "reference", f"its 2:4 kernels failed at {tokens} tokens: {error}")
    return replace(measured[shape], name=name)


def _measure(
    layer: EffectiveLayer, backend: str, tokens: int, dtype: torch.dtype, cache: search.Cache | None
) -> Decision:
    """The decision for a layer that has a kernel."""
    found = None if cache is None else _search(layer, tokens, dtype, cache)
    if backend == "cusparselt":
        return Decision("", "cusparselt", "asked for", algorithms=found)
    dense_us, sparse_us = _time_us(layer, tokens, dtype, found)
    gain = dense_us / sparse_us
    text = f"{gain:.2f} times as fast as dense at {tokens} tokens"
    if gain > GAIN:
        return Decision("", "cusparselt", text, dense_us, sparse_us, found)
    return Decision("", "reference", f"sparse would be {text}; more than {GAIN:.2f} is asked", dense_us, sparse_us)


def _search(layer: EffectiveLayer, tokens: int, dtype: torch.dtype, cache: search.Cache) -> Algorithms:
    out, inner = layer.weight.shape[:2]
    forward = search.Product(out, inner, tokens, dtype, bias=layer.bias is not None)
    backward = None if layer.rule.backward == "dense" else search.Product(inner, out, tokens, dtype)
    best = [0 if product is None else search.best_algorithm(product, cache) for product in (forward, backward)]
    return Algorithms(tokens, *best)


@torch.no_grad()
def _time_us(
    layer: EffectiveLayer, tokens: int, dtype: torch.dtype, algorithms: Algorithms | None
) -> tuple[float, float]:
    """Dense and sparse time of one step's forward product and input gradient, medians of interleaved rounds."""
    first, second = (0, 0) if algorithms is None else algorithms.at(tokens)
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
        library.spmm(library.compress(forward), x, None, first)
        if sparse_backward:
            library.spmm(library.compress(backward_t), g, None, second)
        else:
            g @ backward

    rounds = [(event_us(dense), event_us(sparse)) for _ in range(_ROUNDS + 2)][2:]  # the first two warm up
    return statistics.median(pair[0] for pair in rounds), statistics.median(pair[1] for pair in rounds)
