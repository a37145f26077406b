"""Masks as bits, and files of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """A bool mask as bits: uint8 of ceil(n / 8), row-major, first weight in the highest bit; on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of `shape` that `pack` packed."""
    flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()))
    return flat.view(torch.bool).view(shape)


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write bool masks to a safetensors file, 1 bit a weight; shapes are in its metadata."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    save_file({name: pack(mask) for name, mask in masks.items()}, path, {"shapes": json.dumps(shapes)})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_masks` wrote.

    Raises:
        ValueError: a file without masks, or no whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "shapes" not in metadata:
                raise ValueError(f"{path} holds no masks. Write them with save_masks.")
            shapes = json.loads(metadata["shapes"])
            return {name: unpack(file.get_tensor(name), torch.Size(shape)) for name, shape in shapes.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}). Write it with save_masks.") from None
