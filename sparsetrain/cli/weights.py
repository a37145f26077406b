"""Weights to begin with."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sparsetrain.cli.artifacts import network_of


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights and buffers in `path` into `module`, or into its network if they have the network's names.

    Args:
        module: the LightningModule.
        path: a run's model.safetensors, another safetensors file, a state dict that torch saved, or a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, a damaged one, or names or shapes of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"init_from={path} does not exist. Give a state dict, such as <run>/model.safetensors.")
    state = _read(path)
    state = state.get("state_dict", state)
    network = network_of(module)
    target = network if state.keys() & network.state_dict().keys() else module
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"init_from={path} holds the weights of another network. {error}") from None


def _read(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        begin = file.read(2)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if begin.startswith((b"PK", b"\x80")):  # what torch saves: a zip, and before torch 1.6 a pickle
            state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        reason = "it is neither safetensors nor what torch has saved"
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error)
    raise ValueError(f"init_from={path} cannot be read: {reason}. Give a state dict, such as <run>/model.safetensors.")
