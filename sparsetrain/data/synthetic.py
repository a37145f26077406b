"""Made-up images of any shape, number of classes and size, which a small network can learn."""

import torch
from torch import Tensor

from sparsetrain.data.augment import Augmentation, Flip, Shift
from sparsetrain.data.in_memory import InMemoryDataModule, Samples
from sparsetrain.rng import generator

AMPLITUDE = 48.0  # pixel units: of a class's blob, and of the noise at noise=1
CHUNK = 256  # images made at a time: the float32 noise of a large set need not fit in memory


class Synthetic(InMemoryDataModule):
    """A soft blob for each class, at its own place and of its own colour on mid-grey, under Gaussian noise.

    Classes are equally frequent to within one sample. Images depend on `data_seed`, never on `seed`: runs of different
    seeds see the same data. For tests, and for timing a model at the shape of a larger set (3x224x224, 1,000 classes).

    Args:
        shape: (channels, height, width), each at least 1.
        num_classes: at least 2.
        train_size, val_size, test_size: samples; train and test at least 1.
        noise: standard deviation of the noise in units of the blob's amplitude (48 of 255), at least 0.
        data_seed: of the images.
        shift, flip: as in `CIFAR10`; off by default.
        batch_size: see `InMemoryDataModule`, as for the other arguments.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        train_size: int = 1024,
        val_size: int = 256,
        test_size: int = 256,
        noise: float = 0.5,
        data_seed: int = 0,
        shift: int = 0,
        flip: bool = False,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        augment: list[Augmentation] = [Shift(shift)] if shift else []
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            augment=[*augment, Flip()] if flip else augment,
            drop_last=drop_last,
            seed=seed,
        )
        if len(shape) != 3 or min(shape) < 1 or num_classes < 2 or min(train_size, test_size) < 1 or noise < 0:
            raise ValueError(
                f"Synthetic(shape={tuple(shape)}, num_classes={num_classes}, train_size={train_size}, "
                f"test_size={test_size}, noise={noise}): shape is three numbers of at least 1, num_classes at least 2, "
                "sizes at least 1 and noise at least 0."
            )
        channels, height, width = shape
        self.input_shape = (channels, height, width)
        self.num_classes = num_classes
        self.train_size, self.test_size = train_size, test_size
        self.noise, self.data_seed = noise, data_seed

    def read(self) -> tuple[Samples, Samples]:
        """train_size + val_size images, and test_size more of the same classes."""
        return self._draw("train", self.train_size + self.val_size), self._draw("test", self.test_size)

    def _draw(self, part: str, count: int) -> Samples:
        stream = generator(self.data_seed, "synthetic", part)
        labels = (torch.arange(count) % self.num_classes)[torch.randperm(count, generator=stream)]
        images = torch.empty(count, *self.input_shape, dtype=torch.uint8)
        for first in range(0, count, CHUNK):
            chunk = self._blobs(labels[first : first + CHUNK])
            chunk += self.noise * AMPLITUDE * torch.randn(chunk.shape, generator=stream)
            images[first : first + CHUNK] = chunk.round_().clamp_(0, 255).byte()
        return Samples(images, labels)

    def _blobs(self, labels: Tensor) -> Tensor:
        """float32 [B, C, H, W] in pixel units: each label's image without noise."""
        channels, height, width = self.input_shape
        stream = generator(self.data_seed, "synthetic", "classes")
        centre = torch.rand(self.num_classes, 2, generator=stream)[labels]
        colour = torch.rand(self.num_classes, channels, generator=stream)[labels] * 2 - 1
        y = (torch.arange(height) + 0.5) / height - centre[:, :1]
        x = (torch.arange(width) + 0.5) / width - centre[:, 1:]
        blob = torch.exp(-(y.square()[:, :, None] + x.square()[:, None, :]) / (2 * 0.2**2))
        return 128 + AMPLITUDE * colour[:, :, None, None] * blob[:, None]
