"""Linear and convolution layers that compute with effective weights, made from plain ones in place and undone exactly.

Only the class of a module changes: its Parameters, their names, its hooks and every reference to it stay.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.ops import autograd, cusparselt, library
from sparsetrain.ops.rules import NMRule
from sparsetrain.selection import PlanRow, Selection

_OWN = (
    "rule",
    "backend",
    "algorithms",
    "called",
    "_held",
    "_cached",
    "_compressed",
    "_fresh",
    "_seen",
    "_of",
)  # what conversion adds


class _Effective(nn.Module):
    """What both layers share: a rule, a cache of effective weights, and a mask that may be held fixed."""

    weight: Tensor
    rule: NMRule
    backend: Literal["reference", "cusparselt"]  # set by `policy.choose`
    algorithms: cusparselt.Algorithms | None  # the same; None: the default ones
    called: bool  # whether a forward that is not compiled has been made since this was set to False
    _held: Tensor | None  # plain attributes: never in the state dict
    _cached: tuple[Tensor, Tensor] | None
    _compressed: tuple[Tensor, Tensor] | None
    _fresh: bool  # whether forwards use the cache
    _seen: int  # the weight's version when the cache was made; compiled forwards must not read it
    _of: tuple[int, int]  # which weight that was, and where; another one may lie in its place for a call

    @property
    def mask(self) -> Tensor:
        """The mask of the forward product: the held one, or that of the present weights; bool, the weight's shape."""
        return self.rule.mask(self.weight) if self._held is None else self._held

    def effective(self) -> tuple[Tensor, Tensor]:
        """The weights of the forward product and of the input gradient, in the dtype of a plain layer's product here.

        They come from the cache if `refresh_` has filled it for that dtype and device, else from the present weights.
        """
        dtype = autograd.compute_dtype(self.weight)
        if self._is_present and self._cached is not None and self._is_for(dtype, self._cached[0]):
            return self._cached
        return self.rule.weights(self.weight, dtype, mask=self._held)

    def refresh_(self, dtype: torch.dtype | None = None) -> None:
        """Compute the effective weights now; every forward uses them until the next `refresh_` or `forget`.

        Call it after each change of the weight. A forward that finds the weight written in place, or another one in its
        place (`torch.func.functional_call`), computes them anew; one that is compiled does not, and neither writing
        through `.data` nor the step of a fused optimizer is noticed. The cache keeps its storage as long as dtype,
        device and shape stay, so compiled graphs remain valid; a graph whose backward has yet to run is then refused by
        autograd ("modified by an inplace operation").

        Args:
            dtype: the compute dtype, as bfloat16 under autocast; None: the weight's own.
        """
        # Lightning validates in inference mode; tensors made there could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            dtype = dtype or self.weight.dtype
            self._fresh, self._seen, self._of = True, self.weight._version, _identity(self.weight)
            if self.runs_sparse(dtype):
                new, self._cached = self._compress(dtype), None
                if self._compressed is None or any(map(_differ, self._compressed, new)):
                    self._compressed = new
                for old, value in zip(self._compressed, new, strict=True):
                    if old is not value:
                        old.copy_(value)
                return
            self._compressed = None
            if self._cached is None or not _fits(self._cached[0], self.weight, dtype):
                forward = torch.empty_like(self.weight, dtype=dtype)
                self._cached = (forward, forward if self.rule.one_mask else torch.empty_like(forward))
            self.rule.write_(*self._cached, self.weight, mask=self._held)

    @property
    def stale(self) -> bool:
        """Whether `refresh_` is due: after `forget`, or because the weight was written in place or replaced since."""
        return not self._fresh or self._seen != self.weight._version or self._of != _identity(self.weight)

    @property
    def _is_present(self) -> bool:
        """Whether the cache is of the present weight, as far as that can be seen."""
        if not self._fresh or torch.compiler.is_compiling():
            return self._fresh
        weight = self.weight
        return not weight.is_inference() and self._seen == weight._version and self._of == _identity(weight)

    def add_decay_(self, decay: float) -> None:
        """Add decay * (1 - mask) * weight to the weight's gradient, which there must be (SR-STE)."""
        assert self.weight.grad is not None
        mask = self._used() if self._held is None else self._held
        self.rule.add_decay_(self.weight.grad, self.weight, decay, mask=mask)

    def _used(self) -> Tensor | None:
        """The mask from the cache, without kept zeros, whose decay is 0; None if it must be made anew.

        That is without a cache, with one in float16, which rounds small weights to 0, and on a GPU, where one kernel
        ranks the weights as it adds the decay.
        """
        if self._cached is None or not self._is_present or self.weight.is_cuda:
            return None
        forward = self._cached[0]
        return forward != 0 if forward.dtype in (self.weight.dtype, torch.bfloat16) else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the forward product's weights, under the name that the plain layer gives them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f"{prefix}weight"
        if key in destination:  # else it was parametrized since, which the next batch or `fold` refuses
            destination[key] = destination[key].masked_fill(~self.mask, 0)

    def _load_from_state_dict(self, *arguments: Any, **settings: Any) -> None:
        """Load as the plain layer does, and forget what was made of the weights before."""
        super()._load_from_state_dict(*arguments, **settings)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies, whose weights go their own way."""
        return self.__dict__ | {"_cached": None, "_compressed": None, "_fresh": False}

    def forget(self) -> None:
        """Use the cache no more: each forward computes the effective weights again, until the next `refresh_`."""
        self._fresh = False

    def _is_for(self, dtype: torch.dtype, cached: Tensor) -> bool:
        return cached.dtype == dtype and cached.device == self.weight.device

    def runs_sparse(self, dtype: torch.dtype) -> bool:
        """Whether the products in `dtype` are those of sparse kernels."""
        return self.backend == "cusparselt" and dtype in cusparselt.DTYPES

    def _compress(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The operands of `autograd.sparse_linear`, from the present weights; a 1x1 kernel as a matrix."""
        matrix = self.weight.detach().flatten(1)
        if self.rule.backward == "bidirectional":
            forward, backward_t = library.prune_dual_t(matrix, self.rule.n, self.rule.m, dtype)
            return library.compress(forward), library.compress(backward_t)
        held = None if self._held is None else self._held.flatten(1)
        forward = self.rule.weights(matrix, dtype, mask=held)[0].contiguous()
        if self.rule.backward == "dense":
            return library.compress(forward), forward
        return library.compress(forward), library.compress(forward.t().contiguous())

    def _sparse_product(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The product of x [..., in] by sparse kernels, from the cache if it is of this dtype."""
        operands = self._compressed
        if not self._is_present or operands is None or not self._is_for(dtype, operands[0]):
            operands = self._compress(dtype)
        algorithms = (0, 0) if self.algorithms is None else self.algorithms.at(x.numel() // x.shape[-1])
        sparse_backward = self.rule.backward != "dense"
        return autograd.sparse_linear(
            x, self.weight, bias, *operands, sparse_backward=sparse_backward, algorithms=algorithms
        )

    def hold_(self, mask: Tensor | None) -> None:
        """Keep `mask` for both products whatever the weights become, until `hold_(None)`; forgets the cache.

        Args:
            mask: bool, the weight's shape, as `mask` gave it at some time.

        Raises:
            ValueError: the rule is bidirectional, or the mask is not a bool tensor of the weight's shape.
        """
        if mask is not None:
            if not self.rule.one_mask:
                raise ValueError("A bidirectional rule has two masks, so one cannot be held. Use another `backward`.")
            if mask.dtype != torch.bool or mask.shape != self.weight.shape:
                raise ValueError(
                    f"The mask is {mask.dtype} {tuple(mask.shape)}; needed is torch.bool {tuple(self.weight.shape)}."
                )
            mask = torch.empty_like(self.weight, dtype=torch.bool).copy_(mask)
        self._held = mask
        self.forget()


class EffectiveLinear(_Effective, nn.Linear):
    """A linear layer with effective weights; made by `convert`."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # which cannot do this within activation checkpointing
            self.called = True
        dtype = autograd.compute_dtype(self.weight)
        if self.runs_sparse(dtype):
            return self._sparse_product(input, self.bias, dtype)
        return autograd.linear(input, self.weight, self.bias, *self.effective())


class EffectiveConv2d(_Effective, nn.Conv2d):
    """A 2-D convolution with effective weights; made by `convert`."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # which cannot do this within activation checkpointing
            self.called = True
        x, dtype = input, autograd.compute_dtype(self.weight)
        if self.runs_sparse(dtype):  # a 1x1 kernel without padding: in channels_last the permutations copy nothing
            rows, columns = self.stride
            x = x[..., ::rows, ::columns].movedim(-3, -1)
            return self._sparse_product(x, self.bias, dtype).movedim(-1, -3)
        padding: tuple[int, ...] = (0, 0)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        elif not isinstance(self.padding, str):
            padding = self.padding
        elif self.padding == "same":
            # An even kernel needs one more on the right than on the left, which a convolution cannot take.
            x = F.pad(x, self._reversed_padding_repeated_twice)
        return autograd.conv2d(
            x,
            self.weight,
            self.bias,
            *self.effective(),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )


_EFFECTIVE: dict[type, type[EffectiveLinear] | type[EffectiveConv2d]] = {
    nn.Linear: EffectiveLinear,
    nn.Conv2d: EffectiveConv2d,
}
_PLAIN: dict[type, type] = {effective: plain for plain, effective in _EFFECTIVE.items()}

EffectiveLayer = EffectiveLinear | EffectiveConv2d


def convert(module: nn.Module, rule: NMRule, *, where: Selection = Selection()) -> tuple[PlanRow, ...]:
    """Let the chosen linear and 2-D convolution layers of `module` compute by `rule`, in place.

    Args:
        module: any module; its Parameters and their names stay.
        rule: gives the effective weights.
        where: globs over parameter names.

    Returns:
        One row per parameter: whether its layer was converted (`pruned`), and the reason.

    Raises:
        ValueError: a glob that matches nothing, nothing that can be converted, or a module that has been already.
    """
    for name, _ in effective_layers(module):
        raise ValueError(f"{name!r} is converted already. Call fold(module) or unconvert(module) first.")
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rows: list[PlanRow] = []
    layers: list[nn.Module] = []
    for row in where.plan(module):
        obstacle: str | None = row.reason
        if row.pruned:
            owner, _, attribute = row.name.rpartition(".")
            layer = module.get_submodule(owner)
            obstacle = _obstacle(module, owner, attribute, names[id(layer.get_parameter(attribute))])
            if obstacle is None:
                assert isinstance(layer, nn.Linear | nn.Conv2d)
                obstacle = rule.obstacle(layer)
            if obstacle is None:
                layers.append(layer)
        converted = obstacle is None
        rows.append(PlanRow(row.name, row.shape, converted, str(rule) if converted else str(obstacle)))
    if not layers:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows[:8])
        raise ValueError(f"No layer of {type(module).__name__} can hold {rule}: {reasons}. Choose others in `where`.")
    make_effective(layers, rule)
    return tuple(rows)


def make_effective(layers: Iterable[Any], rule: NMRule) -> None:
    """Convert plain layers that are known to hold the pattern, such as `unconvert` returns."""
    for layer in layers:  # of any type to type checkers, for their class changes
        layer.__class__ = _EFFECTIVE[type(layer)]
        layer.rule, layer.backend, layer.algorithms, layer.called = rule, "reference", None, False
        layer._held = layer._cached = layer._compressed = None
        layer._fresh, layer._seen, layer._of = False, 0, (0, 0)


def effective_layers(module: nn.Module) -> Iterator[tuple[str, EffectiveLayer]]:
    """The converted layers in `module`, itself included, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, EffectiveLinear | EffectiveConv2d):
            yield name, layer


def masks(module: nn.Module) -> dict[str, Tensor]:
    """The mask of each converted layer's forward product, by parameter name; True = kept."""
    return {_join(name, "weight"): layer.mask for name, layer in effective_layers(module)}


def unconvert(module: nn.Module) -> tuple[nn.Module, ...]:
    """Make every converted layer in `module` the plain one that it was, and return these; the dense master stays."""
    layers = tuple(layer for _, layer in effective_layers(module))
    for layer in layers:
        for attribute in _OWN:
            delattr(layer, attribute)
        kind = type(layer)
        if kind in _PLAIN:
            layer.__class__ = _PLAIN[kind]
        else:  # torch.nn.utils.parametrize has made a class of its own for the layer, which its copies share
            bases = tuple(_PLAIN.get(base, base) for base in kind.__bases__)
            layer.__class__ = type(kind.__name__, bases, dict(vars(kind)))
    return layers


@torch.no_grad()
def fold(module: nn.Module) -> dict[str, Tensor]:
    """Set every weight that the forward product does not use to 0, in place, and undo the conversion.

    Returns:
        The masks, by parameter name; True = kept.

    Raises:
        ValueError: a weight that was parametrized after its conversion; nothing is changed then.
    """
    for name, layer in effective_layers(module):
        check_parameter(name, layer)
    folded = masks(module)
    for name, layer in effective_layers(module):
        layer.weight.masked_fill_(~folded[_join(name, "weight")], 0)
    unconvert(module)
    return folded


def check_parameter(name: str, layer: EffectiveLayer) -> None:
    """Raise if the weight of a converted layer is no Parameter any more.

    Raises:
        ValueError: it is computed, by a parametrization.
    """
    if "weight" not in layer._parameters:
        raise ValueError(
            f"The weight of {name!r} was parametrized after the layer had been converted to {layer.rule}. Do it in "
            "__init__, where the layer stays dense, or add it to `exclude`."
        )


def _obstacle(root: nn.Module, owner: str, attribute: str, names: list[str]) -> str | None:
    """Why the layer called `owner` cannot be converted, whatever the rule."""
    layer = root.get_submodule(owner)
    parent = root.get_submodule(owner.rpartition(".")[0]) if owner else None
    if isinstance(layer, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return "attention projection: nn.MultiheadAttention multiplies it without calling a layer"
    if type(layer) not in _EFFECTIVE:
        return f"{type(layer).__name__} is not exactly nn.Linear or nn.Conv2d"
    if len(names) > 1:
        return f"tied: also called {', '.join(name for name in names if name != _join(owner, attribute))}"
    if "forward" in vars(layer):
        return "its forward is replaced on the instance"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return "nn.TransformerEncoderLayer's fast path skips the layer: torch.backends.mha.set_fastpath_enabled(False)"
    return None


def _identity(weight: Tensor) -> tuple[int, int]:
    return id(weight), weight.data_ptr()


def _fits(cached: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    where = cached.dtype == dtype and cached.device == weight.device
    return where and cached.shape == weight.shape and cached.stride() == weight.stride()


def _differ(old: Tensor, new: Tensor) -> bool:
    return old.shape != new.shape or old.dtype != new.dtype or old.device != new.device


def _join(owner: str, attribute: str) -> str:
    return f"{owner}.{attribute}" if owner else attribute
