"""Gates that are trained beside a LightningModule: put on it, held at what all ranks agree on, looked at, taken off."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from sparsetrain.callbacks.gated import Gated
from sparsetrain.callbacks.penalty import AddedTerms
from sparsetrain.callbacks.recalibration import MOST_IMAGES, fresh, inputs_of
from sparsetrain.callbacks.trainer import forget_compiled, train_loaders
from sparsetrain.gates import Gates, make_gates
from sparsetrain.modes import evaluating
from sparsetrain.polarization import Consensus, mean_gates
from sparsetrain.rng import generator


class GateTraining:
    """Gates on parts of a module, their optimizer and their terms in the loss, from construction to `remove`.

    The gates are no parts of the module: what looks at its parameters (optimizers, DDP, averages) does not see them.
    Their gradients are the means over ranks, not scaled, and their steps are made by `step_`; one whose gradients are
    not finite is left out.

    Args:
        trainer: of the fit.
        pl_module: is trained.
        gated: what has gates.
        lr: of their Adam.
        hidden: hidden units of each gate module; None: static gates.
        seed: of their initial weights, and of the order of data that `consensus` sees.
        terms: mean gates by name, on all ranks -> the terms of the loss by name.

    Raises:
        ValueError: see `AddedTerms`; at the first batch, a layer or block that is not called as a module.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        gated: Sequence[Gated],
        *,
        lr: float,
        hidden: int | None,
        seed: int,
        terms: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self._hidden, self._seed, self._terms = hidden, seed, terms
        self._gates: dict[str, Gates] = {}
        self._added: AddedTerms | None = AddedTerms(pl_module, self._penalties)
        for layer in gated:
            self._gates[layer.name] = self._gates_on(layer)
            layer.attach(pl_module, self._gates[layer.name])
        self._optimizer = torch.optim.Adam([parameter for _, parameter in self._parameters()], lr=lr)
        forget_compiled(pl_module)

    def step_(self) -> None:
        """Let the gates follow their gradients, after those of the module's step."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = [p.grad for _, p in self._parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.copy_(self._reduce(gradient, "mean") / scale)
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            self._optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    @torch.no_grad()
    def consensus(self) -> Consensus:
        """What the gates say of all training data in evaluation mode, on all ranks.

        A loader with an `augment` of its own, as those in `sparsetrain.data` that hold their data in memory, is read
        without it; of one without a length, which may have no end, the first 10,000 inputs are.
        """
        consensus = Consensus()
        if self._hidden is None:
            consensus.observe({name: gates.logits(torch.empty(0)) for name, gates in self._gates.items()})
            return consensus
        batches = self.trainer.num_training_batches
        limit = None if math.isinf(batches) else int(batches)
        with isolate_rng(), evaluating(self.pl_module), self.trainer.precision_plugin.forward_context():
            for loader in train_loaders(self.trainer):
                read = islice(fresh(_plain(loader), self._seed), limit)
                is_endless, seen = limit is None and sized_len(loader) is None, 0
                for inputs in inputs_of(self.trainer, self.pl_module, read):
                    self.pl_module(inputs)
                    consensus.observe(self._last_logits())
                    seen += len(inputs)
                    if is_endless and seen >= MOST_IMAGES:
                        break
        consensus.sum_over_ranks(lambda total: self._reduce(total, "sum"))
        return consensus

    def remove(self) -> None:
        """Leave the module as it was; may be called again."""
        if self._added is None:
            return
        for gates in self._gates.values():
            gates.detach()
        self._added.remove()
        self._added = None
        forget_compiled(self.pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only; gradients too, that may have been accumulated."""
        gradients = {name: p.grad for name, p in self._parameters() if p.grad is not None}
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self._parameters()},
            "gradients": {name: self._reduce(gradient, "mean").clone() for name, gradient in gradients.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, parameter in self._parameters():
            parameter.copy_(state["parameters"][name])
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self._optimizer.load_state_dict(state["optimizer"])

    def _penalties(self, pl_module: L.LightningModule, batch: Any, outputs: Any) -> dict[str, Tensor]:
        means = mean_gates(self._last_logits(), mean_over_ranks=lambda mean: self._reduce(mean, "mean"))
        pl_module.log("gates/open", torch.cat(list(means.values())).detach().mean(), batch_size=1)
        return self._terms(means)

    def _last_logits(self) -> dict[str, Tensor]:
        """The logits of the last batch, which are given once: their graph ends with its step."""
        logits = {}
        for name, gates in self._gates.items():
            if gates.last_logits is None:
                raise ValueError(
                    f"The gates of {name!r} have seen no batch: this is not called as a module, or not in every step, "
                    "or only without gradients, as by activation checkpointing with use_reentrant=True. Add its "
                    "weights to `exclude`, or take use_reentrant=False."
                )
            logits[name], gates.last_logits = gates.last_logits, None
        return logits

    def _gates_on(self, layer: Gated) -> Gates:
        gates = make_gates(
            len(layer.units),
            name=layer.name,
            axis=layer.axis,
            features=layer.features,
            hidden=self._hidden,
            generator=generator(self._seed, "gates", layer.name),
        )
        weight = next(self.pl_module.get_submodule(layer.name).parameters())
        return gates.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, gates in self._gates.items():
            yield from ((f"{name}.{part}", parameter) for part, parameter in gates.named_parameters())

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        """The sum or mean of a tensor over all ranks."""
        if self.trainer.world_size == 1:
            return tensor
        reduced: Tensor = self.trainer.strategy.reduce(tensor.clone(), reduce_op=how)
        return reduced


def _plain(loader: Any) -> Any:
    """The loader without the augmentation that it does itself."""
    if not hasattr(loader, "augment"):
        return loader
    plain = copy.copy(loader)
    plain.augment = ()
    return plain
