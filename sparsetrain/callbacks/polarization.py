"""Polarization-gated training: channels or blocks are gated by input, agree on a static network, and that trains on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.callbacks.forward_trial import ForwardTrial
from sparsetrain.callbacks.gate_training import GateTraining
from sparsetrain.callbacks.gated import Gated, close_, closed_units, gated_blocks, gated_layers, masked, operations
from sparsetrain.callbacks.penalty import LinearWeight
from sparsetrain.callbacks.recalibration import recalibrate
from sparsetrain.callbacks.trainer import example_of, is_fast_dev_run, train_loaders, uncompiled
from sparsetrain.choices import check_choice
from sparsetrain.export import Unit, units
from sparsetrain.masks import Masks, Pruning
from sparsetrain.polarization import Operation, budget_error, disagreement, expected_cost
from sparsetrain.selection import Selection
from sparsetrain.steps import check_steps

_POINTS = 200  # of a history
_MOST_UNDECIDED = 0.01  # share of the gates above which the run warns
_POLARIZATION = LinearWeight(10.0, "0.5run", "0.7run")


@dataclass(frozen=True)
class Extraction:
    """How the gates became one static network.

    Args:
        step: optimizer steps made before.
        cost: of the static network, as a share of the dense one's, in [0, 1].
        gates: how many there were.
        closed: how many of them were closed.
        undecided: the share of the gates, in [0, 1], that were open for more than 5 % of the samples and fewer than 95.
        overruled: how many were decided over the samples, and decided otherwise for the budget.
    """

    step: int
    cost: float
    gates: int
    closed: int
    undecided: float
    overruled: int


class PolarizationGating(SparsityCallback):
    """Train gates on channels or blocks along with the network, let them agree, and go on without those closed.

    Each gated layer gets a light module that looks at the layer's input and opens or closes each of its output
    channels, by example; a gated block gets one with one gate, and returns its input where that is closed.
    Straight-through gradients train them. Added to the loss is

        a(t) * mean_i g_i * (1 - g_i)  +  b * (C(g) / C_dense - (1 - s(t)))^2

    with g_i the mean of gate i over the batch, on all ranks, and C the expected cost of one example; see
    `sparsetrain.polarization`. The first term makes a gate the same for all inputs, the second meets the budget. That
    shrinks bit by bit: s(t) grows linearly from 0 at `begin` to `sparsity` at `end`, so that gates close one after the
    other.

    At `extract_at` the gates are looked at over all training data, in evaluation mode; those open for the fewest
    examples are closed until the budget is met, and of them those that still fit are opened again. Of a loader without
    a length the first 10,000 examples are looked at; static gates need none. `forward` is called there, and for batch
    norm, with the first part of each batch as the loader and the transfer hooks give it: normalize in one of these or
    in `forward`, not in `training_step`. That is tried with the second batch of the fit. The weights that read closed
    channels become 0 and are masked from there on; of closed blocks, those of linear layers and convolutions and what
    closes the block do, such as its last batch norm. Batch norm's statistics are computed anew, and the gates are gone:
    the rest of the run is plain training of the static network. After the fit, `export.shrink` makes it small:

        small = export.shrink(module, callback.units, example_input)
        export.save_shrunk(folder, small)

    Before the extraction a checkpoint's `state_dict` is that of the plain network, which computes what the gated one
    does with all gates open; the gates are in this callback's state. Gates are no parameters of the module: they are
    trained by an Adam of their own, so that the module's optimizers and schedulers, its averages and the norm that
    clips its gradients are those of a dense run. Validation sees the gates; monitored checkpoints wait for the static
    network. A run that ends before the extraction leaves the dense network, and says so.

    Gated by "channel" are linear layers and convolutions whose channels one other layer reads: the inner layers of
    residual blocks and of MLPs, and plain stacks; and the heads of attention, see `export.units`. Not gated are
    channels that blocks add up, and grouped convolutions. torch-pruning finds them, which needs one run of `forward` on
    an example. Gated by "layer" are residual blocks with an identity shortcut; see `export.blocks`, which tries them
    out in float64. Whole blocks meet a budget coarsely: the cost that is left is the nearest one at or below it.

    Args:
        granularity: "channel" (channels, hidden units and heads) or "layer" (whole blocks).
        sparsity: the share of the dense cost to remove, in (0, 1).
        measure: the cost, "flops" or "params", of what `forward` runs.
        extract_at: the optimizer step at which the static network is extracted, at least 1.
        begin: where s(t) begins to grow,
        end: and where it is `sparsity`.
        polarization: a(t), at the optimizer steps that it says; gates that all examples share are hard to move, so let
            it grow when the budget is met.
        budget: b, at least 0.
        gate_lr: learning rate of the gates, above 0, constant.
        hidden: hidden units of each gate module, at least 1; None: static gates, one free logit each.
        input_shape: of one example without the batch, such as (3, 32, 32), for a forward pass of zeros; None takes the
            module's `example_input_array`.
        where: the gated layers, by the names of their weights, or the blocks in which one of these lies; of those that
            cannot be gated, none is.
        check: as in `SparsityCallback`.

    Attributes:
        units: the closed units, of the module that is trained; empty before the extraction.
        extraction: what was found then; None before.
        history_of_gates: name of the gated layer or block -> (optimizer step, share of open gates) points, at most 400
            of them.
        history_of_cost: at the same steps, the expected cost as a share of the dense one's.
        masks: of the weights that read gated channels; or of the weights in gated blocks, and of what closes these.

    Raises:
        ValueError: a number out of range; at the start of the fit, a length that is none or beyond the run, no example,
            a module that cannot be traced, no layer or block to gate, a budget that cannot be met, manual optimization,
            or a loader whose batches the extraction could not use.
        ImportError: at the start of the fit, torch-pruning is missing (for channels).

    Source: Zhi et al. 2023, arXiv:2302.10798: binary gating modules with straight-through gradients, a polarization
        loss, a sparsity that the user sets, one run, one static network. Only the abstract was at hand. Ours are the
        form of the gates (`sparsetrain.gates`) and of both terms, their weights and ramps, the gates' optimizer, the
        ranking at the extraction, and the training after it.
    """

    extraction: Extraction | None
    history_of_gates: dict[str, list[tuple[int, float]]]
    history_of_cost: list[tuple[int, float]]
    _training: GateTraining | None
    _layers: tuple[Gated, ...]
    _operations: tuple[Operation, ...]
    _target: LinearWeight  # s(t)
    _weight: LinearWeight  # a(t)
    _extract_at: int
    _seed: int
    _is_small: bool
    _trial: ForwardTrial | None

    def __init__(
        self,
        granularity: Literal["channel", "layer"] = "channel",
        *,
        sparsity: float = 0.5,
        measure: Literal["flops", "params"] = "flops",
        extract_at: int | str = "0.75run",
        begin: int | str = "0.05run",
        end: int | str = "0.5run",
        polarization: LinearWeight = _POLARIZATION,
        budget: float = 100.0,
        gate_lr: float = 0.01,
        hidden: int | None = 16,
        input_shape: Sequence[int] | None = None,
        where: Selection = Selection(),
        check: str = "cheap",
    ) -> None:
        check_choice(granularity, "granularity", ("channel", "layer"))
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity={sparsity} is the share of the cost to remove, which lies in (0, 1).")
        check_choice(measure, "measure", ("flops", "params"))
        if not (math.isfinite(gate_lr) and gate_lr > 0):
            raise ValueError(f"gate_lr={gate_lr} is a learning rate, which is above 0.")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1, or None for static gates.")
        if not (math.isfinite(budget) and budget >= 0):
            raise ValueError(f"budget={budget} is the weight of a term of the loss, which is at least 0.")
        for name, length in (("extract_at", extract_at), ("begin", begin), ("end", end)):
            check_steps(length, name)
        self.granularity, self.sparsity, self.measure, self.extract_at = granularity, sparsity, measure, extract_at
        self.begin, self.end = begin, end
        self.polarization, self.budget, self.gate_lr, self.hidden = polarization, budget, gate_lr, hidden
        self.input_shape = None if input_shape is None else tuple(input_shape)
        super().__init__(Pruning(where), check=check)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The closed units, for `export.shrink` of the module; empty before the extraction."""
        return () if self.extraction is None else closed_units(self._layers, dict(self.masks))

    def target(self, step: int) -> float | None:
        return None  # the masks change once, with the extraction

    def final_step(self) -> int:
        return self._extract_at - 1

    def prepare(self, trainer: L.Trainer) -> None:
        if is_fast_dev_run(trainer):  # too short for any ramp: it tries the final weights and the extraction
            self._extract_at = self.run.total_steps or 1
            self._target, self._weight = LinearWeight(self.sparsity), LinearWeight(self.polarization.final)
            return
        (self._extract_at,) = self.steps(self.extract_at)
        total = self.run.total_steps
        if self._extract_at < 1 or (total is not None and self._extract_at > total):
            limit = "" if total is None else f", and at most {total}, as many as the run has"
            raise ValueError(
                f"extract_at={self.extract_at!r} is step {self._extract_at}; it must be at least 1{limit}."
            )
        self._target = LinearWeight(self.sparsity, self.begin, self.end).resolve(self.run)
        self._weight = self.polarization.resolve(self.run)

    def take_hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seed = trainer.strategy.broadcast(torch.initial_seed())
        self._find(pl_module)
        super().take_hold(trainer, pl_module)
        if self.extraction is None:
            self._training = GateTraining(
                trainer,
                pl_module,
                self._layers,
                lr=self.gate_lr,
                hidden=self.hidden,
                seed=self._seed,
                terms=self._terms,
            )
            if self._restored is not None:
                self._training.load_state_dict(self._restored["gates"])
            self._trial = ForwardTrial.of(trainer, pl_module, always=self.hidden is not None)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._trial is not None:
            self._trial.begin_batch(batch)

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._training is not None:
            self._training.zero_grad()  # of a step that a gradient scaler has skipped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.extraction is None:
            rank_zero_warn(
                f"The run ended at step {self.step}, before its gates became a static network (step "
                f"{self._extract_at}): the module is the dense network, with all gates open."
            )
        super().on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.masks and self._restored is not None:  # resumed from the end of the run
            self._find(pl_module)
        super().on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "seed": self._seed,
            "is_small": self._is_small,
            "history_of_gates": self.history_of_gates,
            "history_of_cost": self.history_of_cost,
            "extraction": None if self.extraction is None else asdict(self.extraction),
            "gates": None if self._training is None else self._training.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._seed, self._is_small = state["seed"], state["is_small"]
        self.history_of_gates, self.history_of_cost = state["history_of_gates"], state["history_of_cost"]
        self.extraction = None if state["extraction"] is None else Extraction(**state["extraction"])

    def _begin(self) -> None:
        super()._begin()
        self.extraction, self._training = None, None
        self._layers, self._operations = (), ()
        self._extract_at, self._seed, self._is_small = 1, 0, False
        self._trial = None
        self.history_of_gates = {}
        self.history_of_cost = []

    def _detach(self) -> None:
        super()._detach()
        if self._trial is not None:
            self._trial.release()
            self._trial = None
        if self._training is not None:
            self._training.remove()  # it stays, for those that save after this

    def _find(self, pl_module: L.LightningModule) -> None:
        """Look for what can be gated, and give what is to be 0 without it masks."""
        if self._restored is not None and self._restored["is_small"]:  # what was closed is gone
            names = tuple(self._restored["shapes"])
            self.masks = Masks(Pruning(Selection(include=names)), also=names)
            return
        example, where = example_of(pl_module, self.input_shape, of=self), self.pruning.where
        with uncompiled(pl_module):
            if self.granularity == "layer":
                self._layers = gated_blocks(pl_module, example, where)
            else:
                self._layers = gated_layers(pl_module, units(pl_module, example), where)
        self._operations = operations(pl_module, self._layers, example, self.measure)
        counts = {layer.name: len(layer.units) for layer in self._layers}
        least = {name: torch.eye(1, count)[0] * (count > 1) for name, count in counts.items()}
        lowest = float(expected_cost(least, self._operations)) / sum(operation.cost for operation in self._operations)
        if lowest > 1 - self.sparsity:
            raise ValueError(
                f"sparsity={self.sparsity} cannot be met: with all gates closed but one where a layer has several, "
                f"{lowest:.4f} of the {self.measure} of {type(pl_module).__name__} are left. Ask for less, or gate "
                "more layers."
            )
        names = masked(pl_module, self._layers)
        self.masks = Masks(Pruning(Selection(include=names)), also=names)
        of = "blocks" if self.granularity == "layer" else f"channels or heads of {len(counts)} layers"
        rank_zero_info(f"Gates on {sum(counts.values())} {of}: {', '.join(counts)}.")

    def _terms(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._note(means)
        return {
            "polarization": self._weight.at(self.step) * disagreement(means),
            "budget": self.budget * budget_error(means, self._operations, self._target.at(self.step)),
        }

    @torch.no_grad()
    def _note(self, means: Mapping[str, Tensor]) -> None:
        is_new = not self.history_of_cost or self.history_of_cost[-1][0] < self.step  # batches may be accumulated
        if not is_new or self.step % max(1, self._extract_at // _POINTS):
            return
        shares = torch.stack([mean.mean() for mean in means.values()]).tolist()
        for name, share in zip(means, shares, strict=True):
            self.history_of_gates.setdefault(name, []).append((self.step, share))
        dense = sum(operation.cost for operation in self._operations)
        self.history_of_cost.append((self.step, float(expected_cost(means, self._operations)) / dense))

    def follow_cut(self, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        super().follow_cut(kept)
        self._layers, self._is_small = (), True

    def _count_step(self) -> None:
        super()._count_step()
        if self._training is not None and self.extraction is None:
            self._training.step_()
            if self.step >= self._extract_at:
                with torch.compiler.set_stance("force_eager"):  # what runs here runs once
                    self._extract(self._training)

    def _extract(self, training: GateTraining) -> None:
        """Make the static network that the gates agree on."""
        trainer, pl_module = training.trainer, training.pl_module
        consensus = training.consensus()
        undecided = consensus.undecided()
        decision = consensus.fill_to_budget(self._operations, 1 - self.sparsity)
        training.remove()
        self._training = None
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        close_(self._layers, dict(decision.open), masks)
        gates = torch.cat(list(decision.open.values()))
        closed = int((~gates).sum())
        self.extraction = Extraction(self.step, decision.cost, gates.numel(), closed, undecided, decision.overruled)
        self._take_masks(trainer, masks, "The masks of the static network")
        recalibrate(trainer, pl_module, train_loaders(trainer), self._seed)
        rank_zero_info(
            f"At step {self.step} {closed} of {gates.numel()} gates were closed, {decision.overruled} decided ones "
            f"overruled; {decision.cost:.4f} of the {self.measure} are left."
        )
        if undecided > _MOST_UNDECIDED:
            rank_zero_warn(
                f"{undecided:.1%} of the gates are undecided at step {self.step}: open for more than 5 % and fewer "
                "than 95 % of the training data. The static network differs from the gated one there. Let the weight "
                "of `polarization` be larger or grow earlier, or extract later."
            )
