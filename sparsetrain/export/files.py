"""Smaller networks as files: which channels and blocks of the base model remain, and their weights."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from sparsetrain.export.architecture import Architecture, base_shapes

_ARCHITECTURE, _WEIGHTS = "architecture.json", "model.safetensors"


def save_shrunk(folder: str | Path, model: nn.Module) -> None:
    """Write a network that `shrink` or `load_shrunk` made to `architecture.json` and `model.safetensors`.

    Args:
        folder: is made if it is not there.
        model: with its present weights: it may have been trained on since.

    Raises:
        ValueError: nothing was removed from the model.
    """
    architecture = Architecture.of(model)
    if architecture.is_whole:
        raise ValueError(f"Nothing was removed from this {type(model).__name__}. Save its state dict instead.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = {"format": 1, **architecture.state()}
    (folder / _ARCHITECTURE).write_text(json.dumps(text))
    save_model(model, str(folder / _WEIGHTS))


def load_shrunk(base_model: nn.Module, folder: str | Path) -> nn.Module:
    """Rebuild a network that `save_shrunk` wrote.

    Args:
        base_model: as the network was before anything was removed, with any weights; left as it is.
        folder: with the two files.

    Returns:
        A smaller copy with the saved weights, on the base model's device and in its dtypes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the base model has other tensors or shapes, or the file is of another format.
    """
    folder = Path(folder)
    architecture = _read(folder / _ARCHITECTURE)
    shapes = base_shapes(base_model)
    for name in [*architecture.shapes, *shapes]:
        here, there = shapes.get(name), architecture.shapes.get(name)
        if here != there:
            raise ValueError(
                f"{folder} was made from another base model: {name!r} is {there or 'missing'} there and "
                f"{here or 'missing'} in this {type(base_model).__name__}. Build the model that was shrunk."
            )
    small = copy.deepcopy(base_model)
    architecture.apply_(small)
    load_model(small, folder / _WEIGHTS)
    return small


def _read(path: Path) -> Architecture:
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") != 1:
        raise ValueError(f"{path} has format {content.get('format')!r}; this version reads 1. Update sparsetrain.")
    return Architecture.from_state(content)
