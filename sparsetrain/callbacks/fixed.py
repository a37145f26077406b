"""Training with masks that are given: fine-tuning a pruned network, or training a ticket."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from sparsetrain.callbacks.base import SparsityCallback
from sparsetrain.mask_files import load_masks
from sparsetrain.masks import Masks, Pruning, masks_in
from sparsetrain.selection import Selection

_REMEDY = "Give a masks.safetensors file or a checkpoint of a sparse run."


class FixedMasks(SparsityCallback):
    """Train on with given masks: pruned weights are zeroed at the start and stay zero; no mask ever changes.

    Args:
        masks: parameter name -> bool tensor of its shape, True = kept; or a file: `masks.safetensors`, or a checkpoint
            of a run with one sparsity callback. Names are those of the LightningModule. For a module pruned with
            `torch.nn.utils.prune` see `masks_of`.
        check: see `SparsityCallback`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no masks, or that cannot be read safely; at the start of the fit, names or shapes
            that the module does not have.
    """

    def __init__(self, masks: Mapping[str, Tensor] | str | Path, *, check: str = "cheap") -> None:
        self._given = dict(masks) if isinstance(masks, Mapping) else _read(Path(masks))
        for name, mask in self._given.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"The mask of {name!r} is {mask.dtype}; it must be torch.bool, True = kept.")
        super().__init__(Pruning(Selection(include=tuple(self._given))), check=check)

    def target(self, step: int) -> float | None:
        return None

    def final_step(self) -> int:
        return 0

    @property
    def at_target(self) -> bool:
        return True

    def _begin(self) -> None:
        super()._begin()
        self.masks = Masks(self.pruning, also=self._given)  # norms too, which close the blocks that were removed

    def initialize(self) -> None:
        self.masks.replace(self._given, "The given masks")


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    """The masks of a module that was pruned with `torch.nn.utils.prune`: parameter name -> bool tensor, True = kept.

    Make its pruning permanent (`prune.remove`) after this call, so that the parameters have their names again.

    Raises:
        ValueError: no parameter of `module` is pruned.
    """
    masks = {
        name.removesuffix("_mask"): buffer.bool()
        for name, buffer in module.named_buffers()
        if name.endswith("_mask") and name.removesuffix("_mask") + "_orig" in dict(module.named_parameters())
    }
    if not masks:
        raise ValueError(f"No parameter of {type(module).__name__} is pruned with torch.nn.utils.prune.")
    return masks


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. {_REMEDY}")
    if path.suffix == ".safetensors":
        return load_masks(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(_why_unsafe(path)) from None
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {_REMEDY}") from None
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} is no checkpoint. {_REMEDY}")
    states = checkpoint.get("callbacks", {})
    found = [s for s in states.values() if isinstance(s, dict) and "masks" in s and "shapes" in s]
    if len(found) != 1:
        raise ValueError(f"{path} holds the masks of {len(found)} sparsity callbacks; it must be exactly one.")
    return masks_in(found[0])


def _why_unsafe(path: Path) -> str:
    try:
        classes = ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
    except ValueError:
        return f"{path} is no checkpoint. {_REMEDY}"
    return (
        f"{path} does not load safely: beside tensors and plain types it holds {classes}, perhaps as hyperparameters. "
        "Give a file that save_masks(callback.masks, path) wrote; or, if you trust this one, call "
        "torch.serialization.add_safe_globals with these classes first."
    )
