"""Smaller networks as files: which channels and blocks of the base model remain, and their weights."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_model
from torch import nn

from sparsetrain.export.architecture import Architecture, base_shapes

_ARCHITECTURE, _WEIGHTS = "architecture.json", "model.safetensors"


def save_shrunk(folder: str | Path, model: nn.Module) -> None:
    """Write a network that `shrink` or `load_shrunk` made to `architecture.json` and `model.safetensors`.

    Args:
        folder: is made if it is not there.
        model: with its present weights: it may have been trained on since.

    Raises:
        ValueError: nothing was removed from the model, or one of its layers was replaced after that.
    """
    architecture = Architecture.of(model)
    if architecture.is_whole:
        raise ValueError(f"Nothing was removed from this {type(model).__name__}. Save its state dict instead.")
    shapes, left = base_shapes(model), architecture.shapes_left()
    for name in [*left, *shapes]:
        if shapes.get(name) != left.get(name) and name.removesuffix(".bias") not in architecture.biases:
            raise ValueError(
                f"{name!r} is {shapes.get(name, 'missing')} in this {type(model).__name__}, and shrinking left it "
                f"{left.get(name, 'missing')}: a layer was replaced after it, which no base model has. Save the state "
                "dict, or replace the layer before shrinking."
            )
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
        ValueError: the base model has other tensors or shapes, the file is of another format, or lacks tensors.
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
    saved, state = load_file(folder / _WEIGHTS), small.state_dict()
    addresses = {state[name].data_ptr() for name in saved.keys() & state.keys()}  # of tied tensors one name is saved
    if lost := [name for name, tensor in state.items() if name not in saved and tensor.data_ptr() not in addresses]:
        raise ValueError(f"{folder / _WEIGHTS} lacks {lost[0]!r}. Save the network again.")
    state.update(saved)  # it has the versions by which some modules read their tensors
    small.load_state_dict(state)
    return small


def _read(path: Path) -> Architecture:
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") != 1:
        raise ValueError(f"{path} has format {content.get('format')!r}; this version reads 1. Update sparsetrain.")
    return Architecture.from_state(content)
