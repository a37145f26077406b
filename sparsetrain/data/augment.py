"""Random changes of a whole batch of raw images at once, as pure functions of (images, generator)."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(Protocol):
    """Changes a batch: uint8 [B, C, H, W] on any device, and a CPU generator -> the same shape, dtype and device."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Shift:
    """Moves each image by its own offset in [-pixels, pixels] down and across; what comes in from outside is 0.

    The same as "pad by `pixels`, crop a random window of the old size". The padding is 0 on *raw* pixels (black),
    before normalisation, as the usual CIFAR recipes with torchvision's `RandomCrop(32, padding=4)` do.

    Args:
        pixels: largest move in pixels, at least 0.

    Raises:
        ValueError: `pixels` is negative.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2 (4 pixels on CIFAR-10; there the per-pixel mean was subtracted
    before, so that its padding is the mean colour).
    """

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(
                f"Shift(pixels={self.pixels}): a move is at least 0 pixels; 0 leaves images where they are."
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = images.shape
        corner = torch.randint(2 * self.pixels + 1, (2, count, 1, 1), generator=generator)
        top, left = corner.to(images.device, non_blocking=True)
        padded = F.pad(images, (self.pixels,) * 4)
        # Whole rows are copied: row y of a plane's window begins at pixel (top + y, left) of the padded plane.
        plane = torch.arange(count * channels, device=images.device).view(count, channels, 1) * padded.shape[2]
        row = torch.arange(height, device=images.device) + top
        first = (plane + row) * padded.shape[3] + left
        runs = padded.flatten().unfold(0, width, 1)  # every run of `width` pixels: a view
        return runs.index_select(0, first.flatten()).view(images.shape)


@dataclass(frozen=True)
class Flip:
    """Mirrors each image left to right with probability 1/2."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        # The chosen indices are found on the CPU: a boolean index on a GPU would wait for it.
        chosen = (torch.rand(len(images), generator=generator) < 0.5).nonzero()[:, 0]
        chosen = chosen.to(images.device, non_blocking=True)
        return images.index_copy(0, chosen, images[chosen].flip(3))
