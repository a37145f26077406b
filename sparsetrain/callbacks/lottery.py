"""Lottery tickets: iterative magnitude pruning that always goes back to the weights of an early step."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from sparsetrain.callbacks.iterative import IterativeMagnitudePruning
from sparsetrain.choices import check_choice
from sparsetrain.masks import Pruning
from sparsetrain.retrain import ReplayLR, Retrain
from sparsetrain.rng import generator
from sparsetrain.selection import Selection
from sparsetrain.tickets import Ticket

CONTROLS = ("none", "random_mask", "reinit", "random_mask_reinit")


class LotteryTicketRewinding(IterativeMagnitudePruning):
    """Find a sparse network that trains as well as the dense one from the weights of an early step; or train such one.

    Without a given ticket, rounds of pruning go back to the weights and buffers of step `rewind_to` each time; the last
    round trains the ticket, which the attribute `ticket` gives. With one there is a single round, without a dense phase
    or any pruning: the ticket is trained from `rewind_to` to `round_length`, as in the run that found it. Its controls
    show what it owes to its masks and to its weights:

    - "random_mask": the ticket's weights; in each tensor as many are kept as in the ticket, at random places.
    - "reinit": the ticket's masks on the weights with which the module comes, which must be another initialisation.
    - "random_mask_reinit": both.

    Args:
        rounds: prunings, at least 1; 0 with a ticket.
        round_length: of a round that begins at the start of the schedule, such as "40ep".
        rewind_to: the step of the dense phase to whose weights each round goes back; "0it" is the initialisation.
        sparsity, per_round: as in `IterativeMagnitudePruning`; neither with a ticket.
        ticket: a file that `Ticket.save` wrote.
        control: "none" or one of the above; needs a ticket.
        retrain, optimizer_state, pruning, check: as in `IterativeMagnitudePruning`; what is pruned is the ticket's.

    Raises:
        FileNotFoundError: no such ticket.
        ValueError: as `IterativeMagnitudePruning`; arguments that do not go with a ticket; at the start of the fit, a
            ticket of another model, or a "reinit" of the ticket's own initialisation.

    Source: Frankle & Carbin 2019, arXiv:1803.03635; rewinding: Frankle et al. 2020, arXiv:1912.05671. As in open_lth
        the optimizer starts afresh and batch norm's statistics are rewound.
    """

    def __init__(
        self,
        rounds: int,
        round_length: int | str,
        *,
        rewind_to: int | str,
        sparsity: float | None = None,
        per_round: float | None = None,
        ticket: str | Path | None = None,
        control: str = "none",
        retrain: Retrain = ReplayLR(),
        optimizer_state: str = "reset",
        pruning: Pruning = Pruning(),
        check: str = "cheap",
    ) -> None:
        check_choice(control, "control", CONTROLS)
        if ticket is None and control != "none":
            raise ValueError(
                f"control={control!r} needs the ticket that it is compared with. Give its file as ticket=."
            )
        if ticket is not None and (rounds, sparsity, per_round) != (0, None, None):
            raise ValueError(
                f"A given ticket is trained and not pruned, but rounds={rounds}, sparsity={sparsity} and "
                f"per_round={per_round}. Use rounds=0 and leave the two others out."
            )
        self.given = None if ticket is None else Ticket.load(ticket)
        self.control = control
        if self.given is not None:
            pruning = Pruning(Selection(include=tuple(self.given.masks)))
        super().__init__(
            rounds if self.given is None else 1,
            round_length,
            sparsity=sparsity if self.given is None else _sparsity(self.given.masks),
            per_round=per_round,
            dense_length=None if self.given is None else 0,
            weights="rewind",
            rewind_to=rewind_to,
            retrain=retrain,
            optimizer_state=optimizer_state,
            pruning=pruning,
            check=check,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resumed = self._restored is not None
        super().on_train_start(trainer, pl_module)
        own = self.given is not None and self._origin == self.given.origin
        if not resumed and own and "reinit" in self.control:
            raise ValueError(
                f"control={self.control!r} compares the ticket with another initialisation, but the module has the one "
                "from which the ticket was found. Build it after seeding with another number."
            )

    def change_masks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.given is None:
            super().change_masks(trainer, pl_module)
            return
        masks = dict(self.given.masks)
        if "random_mask" in self.control:
            masks = {name: self._at_random(name, mask) for name, mask in masks.items()}
        if "reinit" not in self.control:
            self._snapshot = self.given.weights.cast_like(pl_module)
        self._take_masks(trainer, masks, "The ticket's masks")

    def _at_random(self, name: str, mask: Tensor) -> Tensor:
        """A mask that keeps as many, at uniformly random places; the same on every rank."""
        places = torch.randperm(mask.numel(), generator=generator(self._seed, "random mask", name))
        drawn = torch.zeros(mask.numel(), dtype=torch.bool)
        drawn[places[: int(mask.count_nonzero())]] = True
        return drawn.view(mask.shape)


def _sparsity(masks: Mapping[str, Tensor]) -> float:
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total
