"""Weights to begin with."""

from pathlib import Path

import torch
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
        ValueError: names or shapes of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"init_from={path} does not exist. Give a state dict, such as <run>/model.safetensors.")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    network = network_of(module)
    target = network if state.keys() & network.state_dict().keys() else module
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"init_from={path} holds the weights of another network. {error}") from None
