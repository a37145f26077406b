"""Lottery tickets: the weights to go back to and the masks to train them with, in one file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsetrain.mask_files import load_masks, pack
from sparsetrain.snapshot import Snapshot, write_tensors

_WEIGHTS = "weights/"


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse network that is to be trained.

    Args:
        weights: weights and buffers of the step rewound to, not yet masked.
        masks: parameter name -> bool tensor of its shape, True = kept.
        origin: digest of the weights and buffers with which the run began that found it.
    """

    weights: Snapshot
    masks: Mapping[str, Tensor]
    origin: str

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, which `load_masks` reads too; at `path` is the old file or the whole new one."""
        tensors = {_WEIGHTS + name: tensor for name, tensor in self.weights.tensors.items()}
        tensors |= {name: pack(mask) for name, mask in self.masks.items()}
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        write_tensors(path, tensors, {"shapes": json.dumps(shapes), "origin": self.origin})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file.
        """
        remedy = "Give the ticket.safetensors of a run of LotteryTicketRewinding."
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist. {remedy}")
        try:
            with safe_open(path, framework="pt") as file:
                origin = (file.metadata() or {}).get("origin")
                names = [name for name in file.keys() if name.startswith(_WEIGHTS)]  # noqa: SIM118  # no mapping
                weights = {name.removeprefix(_WEIGHTS): file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}). {remedy}") from None
        if origin is None:
            raise ValueError(f"{path} holds no ticket. {remedy}")
        return cls(Snapshot(weights), load_masks(path), origin)
