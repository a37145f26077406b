"""Which weights each product of a layer uses: the rule of an effective layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain.choices import check_choice
from sparsetrain.nm import check_nm
from sparsetrain.ops import library
from sparsetrain.ops.reference import add_decay_, masked, masked_, nm_mask
from sparsetrain.transposable import best_tiles

_BACKWARDS = ("dense", "bidirectional", "transposable")


@dataclass(frozen=True)
class NMRule:
    """N of every M weights in the products of a linear or 2-D convolution layer.

    With M_f the mask along the input dimension and M_b that along the output dimension:

    | backward        | forward        | input gradient     | weight gradient |
    |-----------------|----------------|--------------------|-----------------|
    | "dense"         | x @ (M_f*W)^T  | g @ (M_f*W)        | g^T @ x         |
    | "bidirectional" | x @ (M_f*W)^T  | g @ (M_b*W)        | g^T @ x         |
    | "transposable"  | x @ (M_t*W)^T  | g @ (M_t*W)        | g^T @ x         |

    "dense" is straight-through training (STE, SR-STE): the input gradient is the derivative of the forward product,
    with *its* weights. No N:M kernel can run it, because the groups of M_f lie along the wrong axis of that product:
    "dense" names the kernel, not the weights. "bidirectional" is BDWP: its input gradient is not that derivative, by
    design. "transposable" has one mask M_t that is N:M along both dimensions.

    Args:
        n: kept per group.
        m: size of a group.
        backward: see above.

    Source: Zhou et al. 2021, arXiv:2102.04010 (SR-STE); Fang et al. 2023, arXiv:2309.13015 (BDWP); Hubara et al. 2021,
        arXiv:2102.08124 (transposable).
    """

    n: int = 2
    m: int = 4
    backward: Literal["dense", "bidirectional", "transposable"] = "dense"

    def __post_init__(self) -> None:
        check_nm(self.n, self.m)
        check_choice(self.backward, "backward", _BACKWARDS)
        if self.backward == "transposable" and self.m > 5:
            raise ValueError(
                f"Transposable {self.n}:{self.m} masks are found by enumeration, for m <= 5 only. Take n=2, m=4."
            )

    def __str__(self) -> str:
        kind = {
            "dense": "in the forward product",
            "bidirectional": "in both directions",
            "transposable": "transposable",
        }
        return f"{self.n}:{self.m} {kind[self.backward]}"

    @property
    def one_mask(self) -> bool:
        """Whether both products use the same weights."""
        return self.backward != "bidirectional"

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of the forward product, which is also that of the exported model.

        Args:
            weight: [out, in / groups, ...] with both divisible by m as far as `obstacle` asks.

        Returns:
            Bool tensor of the weight's shape: M_t if transposable, else M_f.
        """
        weight = weight.detach()
        if self.backward == "transposable":
            return best_tiles(weight.abs(), self.n, self.m)
        return nm_mask(weight, self.n, self.m)

    def weights(
        self, weight: Tensor, dtype: torch.dtype | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weights of the forward product and of the input gradient; one tensor twice unless bidirectional.

        Args:
            weight: the dense master, [out, in / groups, ...].
            dtype: what the results are cast to; masks are made from the master. None: its own.
            mask: used for both in place of a new one; only where both products share one.

        Returns:
            W_f and W_b in the shape and memory format of `weight`, without a gradient.
        """
        weight, dtype = weight.detach(), dtype or weight.dtype
        if mask is not None:
            self._check_one_mask()
            forward = masked(weight, mask, dtype)
        elif self.backward == "bidirectional":
            forward, backward = library.prune_dual(weight, self.n, self.m, dtype)
            return forward, backward
        elif self.backward == "dense":
            forward = library.prune(weight, self.n, self.m, dtype)
        else:
            forward = library.prune_transposable(weight, self.n, self.m, dtype)
        return forward, forward

    @torch.no_grad()
    def write_(self, forward: Tensor, backward: Tensor, weight: Tensor, *, mask: Tensor | None = None) -> None:
        """Write what `weights` would return into `forward` and `backward`, in their dtype.

        Args:
            forward: of the weight's shape and strides.
            backward: the same; `forward` itself unless the rule is bidirectional.
            weight: the dense master.
            mask: as for `weights`.
        """
        if mask is not None:
            self._check_one_mask()
        if self.backward == "transposable" and mask is None:
            mask = self.mask(weight)
        if mask is not None:
            masked_(forward, weight.detach(), mask)
        else:
            library.prune_(weight, self.n, self.m, forward=forward, backward=None if self.one_mask else backward)

    def add_decay_(self, grad: Tensor, weight: Tensor, decay: float, *, mask: Tensor | None = None) -> None:
        """Do grad += decay * (1 - M) * weight in place, M the mask of the forward product (SR-STE).

        Args:
            grad: of the weight's shape; unscaled, and once per optimizer step.
            weight: the dense master.
            decay: lambda, at least 0.
            mask: M, where it is known; None: that of the present weight.
        """
        if mask is None and self.backward != "transposable":
            library.add_decay_(grad, weight, self.n, self.m, decay)
        else:
            add_decay_(grad, weight, self.mask(weight) if mask is None else mask, decay)

    def _check_one_mask(self) -> None:
        if not self.one_mask:
            raise ValueError("A bidirectional rule has two masks, so one cannot be held. Use another `backward`.")

    def obstacle(self, layer: nn.Linear | nn.Conv2d) -> str | None:
        """Why the weights of `layer` cannot hold the pattern, or None if they can."""
        weight, groups = layer.weight, getattr(layer, "groups", 1)
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            return f"weights of {weight.dtype}"
        if groups > 1 and weight.shape[1] == 1:
            return "depthwise convolution"
        sizes = [("input", weight.shape[1])]
        if self.backward != "dense":
            sizes.append(("output", weight.shape[0] // groups))
        each = " per group" if groups > 1 else ""
        for name, size in sizes:
            if size % self.m:
                return f"{size} {name} channels{each} are not divisible by {self.m}"
        return None
