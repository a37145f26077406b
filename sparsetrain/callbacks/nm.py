"""N:M methods: which weights the two products of a layer use."""

from pathlib import Path
from typing import Literal

from sparsetrain.callbacks.nm_training import NMTraining
from sparsetrain.ops import NMRule
from sparsetrain.selection import Selection


class BidirectionalWeightPruning(NMTraining):
    """Train with N:M weights in the forward product and, by masks of their own, in that of the input gradient.

    y = x @ (M_f * W)^T + b with n of every m kept along the input dimension, dx = g @ (M_b * W) with n of every m kept
    along the output dimension, dW = g^T @ x for the dense W. So both products reduce over a sparse operand. The
    backward product is not the derivative of the forward one, by design.

    Args:
        n: kept of every m.
        m: size of a group.
        decay: of pruned weights, as in SR-STE; 0 leaves it out.
        sparse_until: optimizer step, such as "0.8run", from which the layers compute dense to the end; None: never.
        final: after such a dense tail, "sparse" leaves the N:M weights of the master, "dense" the master itself.
        backend: "reference" multiplies masked weights densely, "cusparselt" on 2:4 kernels in each layer that has them,
            "auto" on those that are measured to be faster; `decisions` says which and why.
        algorithms: a file, to which the fastest correct algorithms of 2:4 kernels are written as they are searched, and
            from which later runs take them; None: the default ones.
        where: the parameters; what cannot hold the pattern stays dense, and the plan says why.

    Raises:
        ValueError: numbers out of range; at the start of the fit, nothing that can hold the pattern, a dense tail that
            begins beyond the run, or a backend that cannot run.

    Source: Fang et al. 2023, arXiv:2309.13015 (BDWP); the decay is that of Zhou et al. 2021, arXiv:2102.04010; the
        dense tail that of Hu et al. 2024, arXiv:2404.01847.
    Differs: BDWP's full text was not at hand: that both masks are made of the dense weights independently, and
        that the weight gradient is dense, is reconstructed from its abstract and cost figures.
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        *,
        decay: float = 0.0,
        sparse_until: int | str | None = None,
        final: Literal["sparse", "dense"] = "sparse",
        backend: Literal["auto", "reference", "cusparselt"] = "auto",
        algorithms: Path | str | None = None,
        where: Selection = Selection(),
    ) -> None:
        super().__init__(
            NMRule(n, m, backward="bidirectional"),
            decay=decay,
            refresh="1it",
            sparse_until=sparse_until,
            final=final,
            backend=backend,
            algorithms=algorithms,
            where=where,
        )


class StraightThroughNM(NMTraining):
    """Train with N:M weights in the forward product, and let gradients pass straight through to all weights.

    STE with `decay=0.0`, SR-STE with a decay. With `transposable` one mask is N:M along both dimensions, so that the
    input gradient, too, reduces over a sparse operand.

    Args:
        n: kept of every m.
        m: size of a group.
        decay: SR-STE's, of pruned weights; at least 0.
        transposable: whether masks are N:M along both dimensions; for m <= 5.
        refresh: optimizer steps for which masks are kept, such as "40it" (Hu et al. 2024 for transposable ones).
        sparse_until: optimizer step, such as "0.8run", from which the layers compute dense to the end; None: never.
        final: after such a dense tail, "sparse" leaves the N:M weights of the master, "dense" the master itself.
        backend: "reference" multiplies masked weights densely, "cusparselt" on 2:4 kernels in each layer that has them,
            "auto" on those that are measured to be faster; `decisions` says which and why.
        algorithms: a file, to which the fastest correct algorithms of 2:4 kernels are written as they are searched, and
            from which later runs take them; None: the default ones.
        where: the parameters; what cannot hold the pattern stays dense, and the plan says why.

    Raises:
        ValueError: numbers out of range; at the start of the fit, nothing that can hold the pattern, a dense tail that
            begins beyond the run, or a backend that cannot run.

    Source: Zhou et al. 2021, arXiv:2102.04010 (STE, SR-STE); Hubara et al. 2021, arXiv:2102.08124 (transposable); Hu et
        al. 2024, arXiv:2404.01847 (transposable, refreshed every 40 steps, the decay in the gradient, the dense tail).
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        *,
        decay: float = 2e-4,
        transposable: bool = False,
        refresh: int | str = "1it",
        sparse_until: int | str | None = None,
        final: Literal["sparse", "dense"] = "sparse",
        backend: Literal["auto", "reference", "cusparselt"] = "auto",
        algorithms: Path | str | None = None,
        where: Selection = Selection(),
    ) -> None:
        super().__init__(
            NMRule(n, m, backward="transposable" if transposable else "dense"),
            decay=decay,
            refresh=refresh,
            sparse_until=sparse_until,
            final=final,
            backend=backend,
            algorithms=algorithms,
            where=where,
        )
