"""N:M training: products with N of every M weights, while the optimizer moves all of them."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain import ops
from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.trainer import callbacks_of, has_scaler, set_callbacks
from sparsetrain.masks import Masks, Pruning, pack, unpack
from sparsetrain.ops import NMRule
from sparsetrain.ops.reference import add_decay_
from sparsetrain.selection import PlanRow, Selection
from sparsetrain.steps import check_steps

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class NMTraining(SparsityCallback):
    """What N:M methods share: layers that compute with effective weights, over a dense master that is trained.

    The module's layers are converted at `setup` and folded at the end of the fit: then their weights are N:M sparse,
    and nothing is left of the conversion. Meanwhile their Parameters hold the dense master, which optimizers, weight
    decay and averaging see; each `state_dict` of the module, and so each checkpoint, holds the sparse weights that its
    forward pass uses, under the plain names. What is missing there is in this callback's state, so that a resumed run
    has the same master, bit for bit. Masks are functions of the master, made again after each optimizer step.

    Args:
        rule: the effective weights of a layer.
        decay: SR-STE's: added to the gradient as decay * (1 - mask) * weight, once per optimizer step, after unscaling
            and clipping.
        refresh: steps for which a mask is kept.
        where: the parameters; what cannot hold the pattern stays dense, and the plan says why.
    """

    regrow = True

    _rows: tuple[PlanRow, ...]
    _layers: dict[str, ops.EffectiveLinear | ops.EffectiveConv2d]
    _holders: list[tuple[str, ops.EffectiveLinear | ops.EffectiveConv2d]]
    _shadow: dict[str, Any]
    _handles: list[RemovableHandle]
    _replaced: list[tuple[L.LightningModule, str, Any]]
    _every: int
    _dtype: torch.dtype | None

    def __init__(self, rule: NMRule, *, decay: float, refresh: int | str, where: Selection) -> None:
        if not decay >= 0:
            raise ValueError(f"decay is {decay}; it must be at least 0.")
        check_steps(refresh, "refresh")
        self.rule, self.decay, self.refresh, self.where = rule, decay, refresh, where
        super().__init__(Pruning(where), check="off")

    def target(self, step: int) -> float | None:
        return None  # masks follow from the weights

    def final_step(self) -> int:
        return 0

    @property
    def at_target(self) -> bool:
        """Always: the first step is as sparse as the last."""
        return True

    @property
    def plan(self) -> tuple[PlanRow, ...]:
        """One row per parameter: whether its layer computes with N:M weights, or why not."""
        return self._rows

    def prepare(self, trainer: L.Trainer) -> None:
        (self._every,) = self.steps(self.refresh)
        if self._every < 1:
            raise ValueError(f"refresh={self.refresh!r} is less than one step.")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks = callbacks_of(trainer)
        earlier = list(takewhile(lambda callback: callback is not self, callbacks))
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for callback in callbacks:
            if isinstance(callback, NMTraining) and callback is not self:
                raise ValueError(
                    f"{type(self).__name__} and {type(callback).__name__} would both convert layers of this module, "
                    "which goes with one N:M callback. Remove one of them."
                )
        for callback in earlier:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} has copied the module before {type(self).__name__} could convert its "
                    f"layers. List it after {type(self).__name__}."
                )
        if not any(isinstance(callback, _UndoAtLast) for callback in callbacks):
            set_callbacks(trainer, [*callbacks_of(trainer), _UndoAtLast()])
        if is_overridden("configure_model", pl_module):
            original = pl_module.configure_model

            def configure_model() -> None:
                original()
                if next(ops.effective_layers(pl_module), None) is None:  # averaging calls it before the Trainer does
                    self._convert(pl_module)

            self._replace(pl_module, "configure_model", configure_model)
        else:
            self._convert(pl_module)

    def take_hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind(pl_module)
        self._check_owner(trainer)
        self._follow(trainer, pl_module)
        copies = _copies(trainer, pl_module)
        if self._restored is not None:
            self._restore(self._restored)
            self._restore_masters(self._restored.get("shadow", {}), copies)
        if self._every > 1:
            # The masks of the live master are also those of its averages, which take its place at validation.
            layers = [[layer for _, layer in ops.effective_layers(module)] for module in copies.values()]
            whole = [held for held in layers if len(held) == len(self._layers)]
            self._holders = [pair for held in whole for pair in zip(self._layers, held, strict=True)]
            self._hold()
        self._dtype = _DTYPES.get(str(trainer.precision))
        self.apply()

    def apply(self) -> None:
        """Make the effective weights of the present master."""
        for layer in self._layers.values():
            layer.refresh_(self._dtype)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        pass  # gradients are dense

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply()  # weight averaging has put the master back

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            masters = self._masters(trainer, pl_module)
            state["shadow"] = masters if masters[""] else self._shadow

    def state_dict(self) -> dict[str, Any]:
        self.read_masks()
        return super().state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shadow = self._masters(trainer, pl_module)  # for those that save after this
        self.masks.replace(ops.fold(pl_module), "The final masks")
        self._layers = {}
        self._detach()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if next(ops.effective_layers(pl_module), None) is None:
            return
        self._bind(pl_module)  # resumed from the end of the run: nothing was left to train
        if self._restored is not None:
            self._restore(self._restored)
            self._shadow = self._restored.get("shadow", {})
        self.undo(pl_module)
        self._detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's tuner ends a fit by this alone, having loaded what it saved before the first step.
        if next(ops.effective_layers(pl_module), None) is not None:
            if self._restored is not None and "shadow" in self._restored:
                _add_pruned(pl_module, self._restored["shadow"][""])
            self.undo(pl_module)
        super().teardown(trainer, pl_module, stage)

    def undo(self, pl_module: L.LightningModule) -> None:
        """Make the layers the plain ones that they were; the master stays."""
        self._layers = {}
        ops.unconvert(pl_module)

    def _begin(self) -> None:
        super()._begin()
        self._rows, self._layers, self._handles, self._replaced = (), {}, [], []
        self._every, self._dtype = 1, None
        self._holders, self._shadow = [], {}

    def _bind(self, pl_module: L.LightningModule) -> None:
        self._layers = {f"{name}.weight": layer for name, layer in ops.effective_layers(pl_module)}
        self.masks = Masks(Pruning(Selection(include=tuple(self._layers))))
        self.masks.bind(pl_module)
        self.read_masks()

    def read_masks(self) -> None:
        """Let `masks` be those of the present weights, or those that are kept for some steps."""
        if self._layers:
            self.masks.replace({name: layer.mask for name, layer in self._layers.items()}, "The present masks")

    def _hold(self) -> None:
        """Keep the masks as they are read now, until they are read again."""
        for name, layer in self._holders:
            layer.hold_(self.masks[name])

    def _masters(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {key: _pruned(module) for key, module in _copies(trainer, pl_module).items()}

    def _restore_masters(self, shadow: Mapping[str, Any], copies: Mapping[str, nn.Module]) -> None:
        if lost := sorted(shadow.keys() - copies.keys()):
            raise ValueError(
                f"The checkpoint holds a copy of the weights that no callback has now: {lost[0]}. "
                "Resume a run with the callbacks it was trained with."
            )
        for key, pruned in shadow.items():
            _add_pruned(copies[key], pruned)

    def _convert(self, pl_module: L.LightningModule) -> None:
        self._rows = ops.convert(pl_module, self.rule, where=self.where)

    def _follow(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count steps, make effective weights after each, and add the decay before."""
        for optimizer in trainer.optimizers:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if any(id(layer.weight) in held for layer in self._layers.values()):
                counts = not self._handles
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(partial(self._after_step, counts)))
                if self.decay:
                    self._check_decay(trainer, pl_module, optimizer)
        if not self._handles:
            raise ValueError("No optimizer holds any of the N:M weights. Return one from configure_optimizers.")
        if self.decay:
            clip = _ClipThenDecay(pl_module.configure_gradient_clipping, self)
            self._replace(pl_module, "configure_gradient_clipping", clip)

    def _before_step(
        self, _: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let an optimizer that calls its closure again within a step, as LBFGS does, see the weights it has moved."""
        closure, calls = settings.get("closure"), count()
        if closure is None:
            return None

        def renewed() -> Any:
            if next(calls):
                self.apply()
            return closure()

        return arguments, settings | {"closure": renewed}

    def _after_step(self, counts: bool, *arguments: object) -> None:
        if counts:
            self._count_step()
            if self._every > 1 and self.step % self._every == 0:
                for _, layer in self._holders:
                    layer.hold_(None)
                self.read_masks()
                self._hold()
        self.apply()

    def _check_decay(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"decay={self.decay} is added after gradients are clipped, which a module under manual optimization "
                "does itself. Use decay=0.0 there, or automatic optimization."
            )
        if has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"{type(optimizer).__name__} unscales gradients within its step (fused), so that decay={self.decay} "
                "would be divided by the scale. Use fused=False, precision='bf16-mixed' or decay=0.0."
            )

    def add_decay(self, optimizer: Optimizer) -> None:
        """Add decay * (1 - mask) * weight to the gradients that `optimizer` will use."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for layer in self._layers.values():
            if id(layer.weight) in held and layer.weight.grad is not None:
                add_decay_(layer.weight.grad, layer.weight, layer.mask, self.decay)

    def _replace(self, pl_module: L.LightningModule, name: str, value: Callable[..., Any]) -> None:
        """Set an attribute of the module until `_detach`."""
        self._replaced.append((pl_module, name, vars(pl_module).get(name)))
        setattr(pl_module, name, value)

    def _detach(self) -> None:
        super()._detach()
        for handle in self._handles:
            handle.remove()
        self._handles, self._holders = [], []
        for module, name, before in reversed(self._replaced):
            delattr(module, name) if before is None else setattr(module, name, before)
        self._replaced = []


class BidirectionalWeightPruning(NMTraining):
    """Train with N:M weights in the forward product and, by masks of their own, in that of the input gradient.

    y = x @ (M_f * W)^T + b with n of every m kept along the input dimension, dx = g @ (M_b * W) with n of every m kept
    along the output dimension, dW = g^T @ x for the dense W. So both products reduce over a sparse operand. The
    backward product is not the derivative of the forward one, by design.

    Args:
        n: kept of every m.
        m: size of a group.
        decay: of pruned weights, as in SR-STE; 0 leaves it out.
        where: the parameters; what cannot hold the pattern stays dense, and the plan says why.

    Raises:
        ValueError: numbers out of range; at the start of the fit, nothing that can hold the pattern.

    Source: Fang et al. 2023, arXiv:2309.13015 (BDWP); the decay is that of Zhou et al. 2021, arXiv:2102.04010.
    Differs: the paper's full text was not at hand: that both masks are made of the dense weights independently, and
        that the weight gradient is dense, is reconstructed from its abstract and cost figures.
    """

    def __init__(self, n: int = 2, m: int = 4, *, decay: float = 0.0, where: Selection = Selection()) -> None:
        super().__init__(NMRule(n, m, backward="bidirectional"), decay=decay, refresh="1it", where=where)


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
        where: the parameters; what cannot hold the pattern stays dense, and the plan says why.

    Raises:
        ValueError: numbers out of range; at the start of the fit, nothing that can hold the pattern.

    Source: Zhou et al. 2021, arXiv:2102.04010 (STE, SR-STE); Hubara et al. 2021, arXiv:2102.08124 (transposable); Hu et
        al. 2024, arXiv:2404.01847 (transposable, refreshed every 40 steps, the decay in the gradient).
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        *,
        decay: float = 2e-4,
        transposable: bool = False,
        refresh: int | str = "1it",
        where: Selection = Selection(),
    ) -> None:
        rule = NMRule(n, m, backward="transposable" if transposable else "dense")
        super().__init__(rule, decay=decay, refresh=refresh, where=where)


class _UndoAtLast(L.Callback):
    """Undoes the conversion after an exception, when the callbacks that save have done so; the master stays."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for callback in callbacks_of(trainer):
            if isinstance(callback, NMTraining):
                callback.undo(pl_module)
        self._leave(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        set_callbacks(trainer, [callback for callback in callbacks_of(trainer) if callback is not self])


class _ClipThenDecay:
    """Stands in for `configure_gradient_clipping`; a copy of the module clips alone."""

    def __init__(self, clip: Callable[..., None], method: NMTraining | None) -> None:
        self.clip, self.method = clip, method

    def __call__(self, optimizer: Optimizer, *arguments: Any, **settings: Any) -> None:
        self.clip(optimizer, *arguments, **settings)
        if self.method is not None:
            self.method.add_decay(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"clip": self.clip, "method": None}


def _copies(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, nn.Module]:
    """The module under "", and the copies of it that callbacks keep, such as averages, by where they lie."""
    live = set(pl_module.modules())
    found: dict[str, nn.Module] = {"": pl_module}
    for callback in callbacks_of(trainer):
        for name, value in vars(callback).items():
            if isinstance(value, nn.Module) and any(layer not in live for _, layer in ops.effective_layers(value)):
                found[f"{callback.state_key}.{name}"] = value
    return found


def _pruned(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer name -> what its state dict leaves out of the master: the mask, packed, and the values where it is not."""
    masks = {name: layer.mask for name, layer in ops.effective_layers(module)}
    return {
        name: {"mask": pack(masks[name]), "values": layer.weight.detach()[~masks[name]].cpu()}
        for name, layer in ops.effective_layers(module)
    }


@torch.no_grad()
def _add_pruned(module: nn.Module, pruned: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what `_pruned` has kept."""
    for name, layer in ops.effective_layers(module):
        weight = layer.weight
        mask = unpack(pruned[name]["mask"], weight.shape).to(weight.device)
        weight[~mask] = pruned[name]["values"].to(weight.device)
