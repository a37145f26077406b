"""Masks: which weights are kept. One bool tensor per pruned parameter, True = kept, owned here and nowhere else."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.allocation import Allocation, Candidates, Global
from sparsetrain.criteria import Criterion, Magnitude
from sparsetrain.mask_files import pack, unpack
from sparsetrain.patterns import Pattern, Unstructured
from sparsetrain.schedules import check_sparsity
from sparsetrain.selection import PlanRow, Selection
from sparsetrain.stats import Stats


@dataclass(frozen=True)
class Pruning:
    """What is pruned, by which score, divided how among the tensors, and in which shape.

    Args:
        where: the parameters.
        criterion: scores their weights.
        allocation: divides the kept weights among them.
        pattern: which shapes a mask may have.
    """

    where: Selection = Selection()
    criterion: Criterion = Magnitude()
    allocation: Allocation = Global()
    pattern: Pattern = Unstructured()


@dataclass(frozen=True)
class Update:
    """What one update of the masks did.

    Args:
        step: the optimizer step before which it was made.
        target: the sparsity asked for.
        kept: weights kept, by parameter name.
        dropped: weights newly pruned.
        grown: pruned weights that came back, as zeros.
    """

    step: int
    target: float
    kept: dict[str, int]
    dropped: dict[str, int]
    grown: dict[str, int]


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool tensor, True = kept; empty until `bind`.

    The mask tensors are changed in place, so compiled graphs that read them stay valid.

    Args:
        pruning: what is pruned and how.
        also: names of parameters that have masks, too, whatever they are: `Selection` chooses no norms and biases.
    """

    def __init__(self, pruning: Pruning = Pruning(), *, also: Collection[str] = ()) -> None:
        self.pruning = pruning
        self._also = frozenset(also)
        self.stats = Stats(self.pruning.criterion.needs - {"grad"})
        self.plan: tuple[PlanRow, ...] = ()
        self._masks: dict[str, Tensor] = {}
        self._kept: dict[str, int] = {}
        self._asked = 0  # weights to keep by the last update; a pattern may have kept some more or fewer
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._aliases: dict[str, list[str]] = {}  # a state dict holds a tied weight under each of its names
        self._pending: Mapping[str, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def bind(self, module: nn.Module) -> None:
        """Choose the parameters of `module` and give each a mask: all True, or as loaded by `load_state_dict` before.

        Weights are left alone; call `apply_` to zero them.

        Raises:
            ValueError: a glob that matches nothing, nothing to prune, a parameter of complex numbers or integers, a
                shape that the pattern does not fit, or loaded masks that belong to another model.
        """
        self.plan = tuple(
            replace(row, pruned=True, reason="pruned") if row.name in self._also else row
            for row in self.pruning.where.plan(module)
        )
        names = [row.name for row in self.plan if row.pruned]
        self._owners = {name: _owner(module, name) for name in names}
        names_of: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names_of.setdefault(id(parameter), []).append(name)
        self._aliases = {name: names_of[id(self.parameter(name))] for name in names}
        for name in names:
            _check_real(self.parameter(name), name)
            self.pruning.pattern.reachable(self.parameter(name).shape, 0)  # raises where the pattern does not fit
        self._masks = {name: torch.ones_like(self.parameter(name), dtype=torch.bool) for name in names}
        self._kept = {name: mask.numel() for name, mask in self._masks.items()}
        self._asked = self.total
        if self._pending is not None:
            self.load_state_dict(self._pending)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter called `name`, looked up in its module: also right after a wrapper has replaced it."""
        owner, attribute = self._owners[name]
        parameter: nn.Parameter = getattr(owner, attribute)
        return parameter

    @property
    def total(self) -> int:
        """The number of maskable weights."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def kept(self) -> dict[str, int]:
        """Weights kept, by parameter name, counted from the masks."""
        return dict(self._kept)

    def sparsity(self) -> float:
        """The share of False over all masks, in [0, 1]; 0 of parameters without elements.

        Raises:
            RuntimeError: not bound.
        """
        self._check_bound()
        return 1.0 - sum(self._kept.values()) / self.total if self.total else 0.0

    def check(self, sparsity: float) -> None:
        """Raise now if `update` would refuse this sparsity, of weights none of which is pruned.

        Raises:
            ValueError: no sparsity, or floors that exceed what is kept.
            RuntimeError: not bound.
        """
        check_sparsity(sparsity, "sparsity")
        self._check_bound()
        candidates = Candidates([mask.shape for mask in self.values()], [mask.numel() for mask in self.values()], [])
        self.pruning.allocation.check(candidates, self._left(sparsity))

    def reachable(self, sparsity: float) -> float:
        """The sparsity nearest to this one that the pattern can express, with every tensor pruned alike."""
        shapes = [mask.shape for mask in self.values()]
        counts = [self.pruning.pattern.reachable(shape, round((1 - sparsity) * shape.numel())) for shape in shapes]
        return 1 - sum(counts) / max(sum(shape.numel() for shape in shapes), 1)

    @torch.no_grad()
    def update(self, sparsity: float, *, regrow: bool = False, step: int = 0, trial: bool = False) -> Update:
        """Make new masks, of exactly the sparsity asked for: n - floor(sparsity * n + 0.5) of n weights are kept.

        A pattern may express only some counts; then each tensor gets the nearest one. Weights are left alone; call
        `apply_`. An error leaves all masks as they were.

        Args:
            sparsity: share of zeros over all maskable weights, in [0, 1).
            regrow: whether pruned weights compete again. If not, the new masks lie within the old ones.
            step: the optimizer step; names the stream of criteria that draw random numbers.
            trial: whether pruning is only tried, as by `fast_dev_run`, which is too short for statistics of any step.

        Raises:
            ValueError: no sparsity; below the present one without `regrow`; floors that exceed what is kept; scores
                that the allocation cannot compare.
            RuntimeError: not bound; a score that is not finite; a gradient, or a step with one, that the criterion
                needs and is missing.
        """
        check_sparsity(sparsity, "sparsity")
        self._check_bound()
        asked, present = self._left(sparsity), sum(self._kept.values())
        if not regrow and asked > max(self._asked, present):
            raise ValueError(
                f"Sparsity {sparsity} lies below the present {self.sparsity():.6f}, but pruned weights do not come "
                "back. Ask for more, or pass regrow=True."
            )
        for name in self:
            _check_finite(self._raw_score(name, step), name, step)
        scores = {name: partial(self._score, name, step, regrow) for name in self}
        available = [mask.numel() if regrow else self._kept[name] for name, mask in self.items()]
        candidates = Candidates([mask.shape for mask in self.values()], available, list(scores.values()))
        budget = self.pruning.allocation.divide(candidates, asked if regrow else min(asked, present))
        pattern = self.pruning.pattern
        counts = [pattern.reachable(self[name].shape, count) for name, count in zip(self, budget.kept, strict=True)]
        if counts != available and not trial:
            self._check_observed(step)
        dropped, grown = {}, {}
        for name, count in zip(self, counts, strict=True):
            new = pattern.mask(scores[name](), count, budget.cut)
            old = self.on(name, new)
            self._kept[name] = _count(new)
            dropped[name] = _count(old & ~new)
            grown[name] = _count(new & ~old)
            old.copy_(new)
        self._asked = asked
        return Update(step, sparsity, self.kept, dropped, grown)

    @torch.no_grad()
    def apply_(self) -> None:
        """Set every pruned weight to 0 (filling, not multiplying: NaN and -0.0 become 0 too)."""
        for name in self.sparse_names():
            parameter = self.parameter(name)
            parameter.masked_fill_(~self.on(name, parameter), 0)

    @torch.no_grad()
    def multiply_(self, names: list[str]) -> None:
        """The quick form of `apply_`, for every step: multiply the weights called `names` by their masks."""
        _multiply_([self.parameter(name) for name in names], [self[name] for name in names])

    @torch.no_grad()
    def zero_grads_(self, names: list[str] | None = None) -> None:
        """Set the gradients of pruned weights to 0, by multiplication; of `names`, or of all. None is passed over."""
        grads = {name: self.parameter(name).grad for name in (self.sparse_names() if names is None else names)}
        present = {name: grad for name, grad in grads.items() if grad is not None}
        _multiply_(list(present.values()), [self[name] for name in present])

    def sparse_names(self) -> list[str]:
        """The parameters of which something is pruned."""
        return [name for name, mask in self._masks.items() if self._kept[name] < mask.numel()]

    def on(self, name: str, like: Tensor) -> Tensor:
        """The mask called `name`, moved to the device and strides of `like` for good if it lies elsewhere."""
        mask = self._masks[name]
        if mask.device != like.device or mask.stride() != like.stride():
            mask = torch.empty_like(like, dtype=torch.bool).copy_(mask)
            self._masks[name] = mask
        return mask

    @torch.no_grad()
    def revived(self, name: str) -> Tensor:
        """Whether a pruned weight of the parameter `name` is not 0, as a bool scalar on its device (no wait for it)."""
        parameter = self.parameter(name)
        return ((parameter != 0) & ~self.on(name, parameter)).any()

    def checksum(self) -> int:
        """63 bits that are equal on two ranks where all masks are."""
        digest = hashlib.sha256()
        for name, mask in self.items():
            digest.update(name.encode())
            digest.update(pack(mask).numpy().tobytes())
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    def apply_to(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> None:
        """Zero the pruned weights in a state dict of the module; tensors that change are replaced, not written to.

        Args:
            state_dict: with the parameters' names, preceded by `prefix`.
            prefix: such as "model.".
        """
        for name in self.sparse_names():
            for key in (prefix + alias for alias in self._aliases[name]):
                if key not in state_dict:
                    continue  # a module may save a part of itself
                weight = state_dict[key]
                pruned = ~self[name].to(weight.device)
                if bool((weight[pruned] != 0).any()):
                    state_dict[key] = weight.masked_fill(pruned, 0)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only; masks at 1 bit a weight, and none of a tensor that is kept whole."""
        return {
            "masks": {name: pack(self[name]) for name in self.sparse_names()},
            "shapes": {name: list(mask.shape) for name, mask in self.items()},
            "asked": self._asked,
            "stats": self.stats.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; before `bind` it is kept until then. Weights are left alone.

        Raises:
            ValueError: masks of other parameters or shapes.
        """
        if not self._masks:
            self._pending = state
            return
        self._pending = None
        self.replace(masks_in(state), "The saved masks")
        self._asked = int(state["asked"])
        self.stats.load_state_dict(state["stats"])

    def replace(self, masks: Mapping[str, Tensor], source: str) -> None:
        """Take over `masks`, which must name the same parameters in the same shapes.

        Raises:
            ValueError: they do not; the message begins with `source`.
        """
        missing, unknown = sorted(self.keys() - masks.keys()), sorted(masks.keys() - self.keys())
        if missing or unknown:
            raise ValueError(
                f"{source} belong to another model or selection: none for {missing[:3]}, and {unknown[:3]} are not "
                "pruned here. Use the model and the `where` with which they were made."
            )
        for name, mask in self.items():
            if masks[name].shape != mask.shape:
                raise ValueError(
                    f"{source} belong to another model: {name!r} has shape {tuple(masks[name].shape)} there and "
                    f"{tuple(mask.shape)} here."
                )
        for name, mask in self.items():
            mask.copy_(masks[name])
            self._kept[name] = _count(mask)
        self._asked = sum(self._kept.values())

    def cut(self, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """Follow parameters of which only some places were kept.

        Args:
            kept: parameter name -> dimension -> the places kept along it; what is not named is kept whole.
        """
        for name in self.keys() & kept.keys():
            self._masks[name] = take(self._masks[name], kept[name])
            self._kept[name] = _count(self._masks[name])
        self._asked = sum(self._kept.values())
        self.stats.load_state_dict(
            {
                name: {statistic: take(total, kept.get(name, {})) for statistic, total in totals.items()}
                for name, totals in self.stats.state_dict().items()
            }
        )
        self.plan = tuple(
            replace(row, shape=tuple(len(kept.get(row.name, {}).get(i, range(n))) for i, n in enumerate(row.shape)))
            for row in self.plan
        )

    def _left(self, sparsity: float) -> int:
        return self.total - math.floor(sparsity * self.total + 0.5)

    def _check_bound(self) -> None:
        if not self._masks:
            raise RuntimeError("The masks belong to no module yet. Call masks.bind(module) first.")

    def _check_observed(self, step: int) -> None:
        for name in self:
            if not self.stats.observed(name):
                raise RuntimeError(
                    f"{type(self.pruning.criterion).__name__} needs steps of {name!r} with a gradient, and none was "
                    f"observed before step {step}: its scores are all 0. Prune later, after a dense phase, or give "
                    "`prune` stats; if it is frozen or unused, add it to `exclude`."
                )

    def _raw_score(self, name: str, step: int) -> Tensor:
        parameter = self.parameter(name)
        evidence = dict(self.stats.get(name, parameter))
        if "grad" in self.pruning.criterion.needs:
            if parameter.grad is None:
                raise RuntimeError(
                    f"{type(self.pruning.criterion).__name__} needs the gradient of {name!r}, which has none at step "
                    f"{step}: it is frozen or unused. Add it to `exclude`."
                )
            evidence["grad"] = parameter.grad
        return self.pruning.criterion.score(parameter.detach(), evidence, name=name, step=step)

    def _score(self, name: str, step: int, regrow: bool) -> Tensor:
        score = self._raw_score(name, step)
        if not regrow and self._kept[name] < score.numel():
            # At most inf where kept, -inf where pruned: a third of the time that filling with -inf takes.
            limit = self.on(name, score).view(torch.uint8).to(score.dtype).sub_(0.5).mul_(math.inf)
            return torch.minimum(score, limit, out=limit)
        return score


def prune(module: nn.Module, sparsity: float, pruning: Pruning = Pruning(), *, stats: Stats | None = None) -> Masks:
    """Prune `module` once, in place, without a Trainer.

    Args:
        module: any module; gradients must be there if the criterion needs them.
        sparsity: share of zeros over the maskable weights, in [0, 1).
        pruning: what is pruned and how.
        stats: running statistics, for criteria that need them.

    Returns:
        The masks, bound to `module`.

    Raises:
        ValueError, RuntimeError: as `Masks.bind` and `Masks.update`; the weights are then unchanged.
    """
    masks = Masks(pruning)
    if stats is not None:
        masks.stats = stats
    masks.bind(module)
    masks.update(sparsity)
    masks.apply_()
    return masks


def take(tensor: Tensor, places: Mapping[int, Sequence[int]]) -> Tensor:
    """A copy of `tensor` with only the given places along each dimension that is named."""
    for dim, index in places.items():
        tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
    return tensor


def masks_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that `Masks.state_dict` has packed: parameter name -> bool tensor, True = kept."""
    shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
    bits = state["masks"]
    return {
        name: unpack(bits[name], shape) if name in bits else torch.ones(shape, dtype=torch.bool)
        for name, shape in shapes.items()
    }


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _check_real(parameter: Tensor, name: str) -> None:
    if not parameter.is_floating_point():
        raise ValueError(
            f"{name!r} is {parameter.dtype}; masks are for parameters of real floating-point numbers. Add it to "
            "`exclude`."
        )


def _multiply_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    if not tensors:
        return
    factors = [mask.view(torch.uint8) for mask in masks]  # half the time of bool
    if tensors[0].device.type == "cpu":
        # The CPU turns each mask into floats first; in pieces, they do not leave the cache.
        pieces = [_split(tensor, factor) for tensor, factor in zip(tensors, factors, strict=True)]
        tensors, factors = ([piece for pair in pieces for piece in pair[side]] for side in (0, 1))
    torch._foreach_mul_(list(tensors), factors)


def _split(*tensors: Tensor) -> list[Sequence[Tensor]]:
    """Views of `tensors`, alike in shape, in pieces of at most 2**17 elements; whole if one is not contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [torch.split(tensor.view(-1), 1 << 17) for tensor in tensors]
    return [[tensor] for tensor in tensors]


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _check_finite(score: Tensor, name: str, step: int) -> None:
    if not math.isfinite(float(score.sum())) and not bool(score.isfinite().all()):
        raise RuntimeError(
            f"The scores of {name!r} at step {step} are not all finite: training has diverged, and masks made from "
            "them would be arbitrary. Lower the learning rate, clip gradients, or begin pruning later."
        )
