"""CIFAR-10 and CIFAR-100 from their official binary version: fixed-size records, nothing is unpickled."""

import shutil
import tarfile
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sparsetrain.data.augment import Augmentation, Flip, Shift
from sparsetrain.data.files import REMEDY, check_labels, check_md5, fetch, read_exactly, whole_or_nothing
from sparsetrain.data.in_memory import InMemoryDataModule, Samples

_RAW = 32
_SIZES = (_RAW, 16, 8)


class CIFAR10(InMemoryDataModule):
    """Ten kinds of objects, 32x32 colour: 45,000 train, 5,000 val, 10,000 test; standardised by fixed statistics.

    Files are read from `root`/cifar-10-batches-bin. Those missing are taken from `root`/cifar-10-binary.tar.gz, which
    is downloaded if it is not there either. Mean and deviation are those usually published for the 50,000, or,
    if they are made smaller, those of the training images.

    Args:
        root: folder above the one of the data.
        size: side of the images in pixels; 16 or 8 are means over 2x2 or 4x4 pixels, for experiments in little time.
        shift: training images are padded by so many black pixels and cropped at random; 0 for none.
        flip: mirror training images left to right at random.
        val_size: see `InMemoryDataModule`, as for the other arguments; 0 trains on all 50,000, as most papers do.

    Raises:
        ValueError: another `size`.
        FileNotFoundError, ValueError, ConnectionError: a file is missing, broken or out of reach.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images". Augmentation: `Shift` and `Flip`.
    """

    num_classes = 10
    input_shape = (3, 32, 32)
    pixel_mean: tuple[float, ...] | None = (0.4914 * 255, 0.4822 * 255, 0.4465 * 255)
    pixel_std: tuple[float, ...] | None = (0.2470 * 255, 0.2435 * 255, 0.2616 * 255)

    address = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    md5 = "c32a1d4ab5d03f1284b67883e8d87530"
    folder_name = "cifar-10-batches-bin"
    label_bytes = 1
    """Labels before the pixels of a record; the last is the class."""
    records: ClassVar[dict[str, int]] = {
        **{f"data_batch_{part}.bin": 10_000 for part in range(1, 6)},
        "test_batch.bin": 10_000,
    }
    """File name -> images in it; the last file is the test set."""

    def __init__(
        self,
        root: str | Path = "data",
        *,
        size: int = 32,
        shift: int = 4,
        flip: bool = True,
        val_size: int = 5_000,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        if size not in _SIZES:
            raise ValueError(f"size={size}; images of 32x32 pixels can be made {', '.join(map(str, _SIZES))} wide.")
        augment: list[Augmentation] = [Shift(shift)] if shift else []
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            augment=[*augment, Flip()] if flip else augment,
            drop_last=drop_last,
            seed=seed,
        )
        self.root, self.size = Path(root), size
        if size != _RAW:
            self.input_shape = (3, size, size)
            self.pixel_mean = self.pixel_std = None

    def prepare_data(self) -> None:
        """Take each missing file out of the archive, and get the archive first if need be."""
        folder = self.root / self.folder_name
        missing = [name for name in self.records if not (folder / name).exists()]
        if not missing:
            return
        archive = self.root / self.address.rsplit("/", 1)[1]
        if archive.exists():
            check_md5(archive, self.md5, remedy=REMEDY)
        else:
            fetch(self.address, archive, self.md5)
        with tarfile.open(archive) as tar:
            for name in missing:
                # By name and to a path of our own: what else is in the archive can write nowhere.
                source = tar.extractfile(f"{self.folder_name}/{name}")
                if source is None:
                    raise ValueError(f"{archive} holds no regular file {self.folder_name}/{name}.")
                with source, whole_or_nothing(folder / name) as target:
                    shutil.copyfileobj(source, target)

    def read(self) -> tuple[Samples, Samples]:
        """The 50,000 training and 10,000 test images."""
        *train, test = (self._read(name, count) for name, count in self.records.items())
        return Samples(*(torch.cat(parts) for parts in zip(*train, strict=True))), test

    def _read(self, name: str, count: int) -> Samples:
        path = self.root / self.folder_name / name
        record = self.label_bytes + 3 * _RAW * _RAW
        content = torch.frombuffer(read_exactly(path, count * record), dtype=torch.uint8).view(count, record)
        labels = content[:, self.label_bytes - 1].long()
        check_labels(labels, self.num_classes, path)
        images = content[:, self.label_bytes :].reshape(count, 3, _RAW, _RAW)
        return Samples(images if self.size == _RAW else _smaller(images, self.size), labels)


class CIFAR100(CIFAR10):
    """A hundred kinds of objects in CIFAR-10's sizes (the fine labels); read from `root`/cifar-100-binary."""

    num_classes = 100
    pixel_mean = (0.5071 * 255, 0.4865 * 255, 0.4409 * 255)
    pixel_std = (0.2673 * 255, 0.2564 * 255, 0.2762 * 255)

    address = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    md5 = "03b5dce01913d631647c71ecec9e9cb8"
    folder_name = "cifar-100-binary"
    label_bytes = 2
    records: ClassVar[dict[str, int]] = {"train.bin": 50_000, "test.bin": 10_000}


def _smaller(images: Tensor, size: int) -> Tensor:
    """Means over squares of pixels, rounded: uint8 [N, 3, 32, 32] -> [N, 3, size, size]."""
    parts = torch.split(images, 1000)  # as floats they are four times as large
    return torch.cat([avg_pool2d(part.float(), _RAW // size).round().to(torch.uint8) for part in parts])
