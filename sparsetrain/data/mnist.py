"""MNIST and Fashion-MNIST from their idx files, in the folders that torchvision uses too."""

import math
import struct
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sparsetrain.data.augment import Shift
from sparsetrain.data.files import REMEDY, check_labels, fetch, read_exactly
from sparsetrain.data.in_memory import InMemoryDataModule, Samples


class MNIST(InMemoryDataModule):
    """Handwritten digits, 28x28 grey: 55,000 train, 5,000 val, 10,000 test; standardised by fixed statistics.

    Files are read from `root`/MNIST/raw, packed (.gz) or not, and downloaded there if they are missing.
    Mean and deviation are those usually published for the 60,000.

    Args:
        root: folder above MNIST/.
        shift: largest random move of a training image in pixels; 0 for none.
        val_size: see `InMemoryDataModule`, as for the other arguments.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: a file is missing, broken or out of reach.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition". MD5s as torchvision has them.
    """

    num_classes = 10
    input_shape = (1, 28, 28)
    pixel_mean = (0.1307 * 255,)
    pixel_std = (0.3081 * 255,)

    name = "MNIST"
    address = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    train_size, test_size = 60_000, 10_000
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    }

    def __init__(
        self,
        root: str | Path = "data",
        *,
        shift: int = 0,
        val_size: int = 5_000,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            augment=(Shift(shift),) if shift else (),
            drop_last=drop_last,
            seed=seed,
        )
        self.folder = Path(root) / self.name / "raw"

    def prepare_data(self) -> None:
        """Download each file that is there neither packed nor unpacked."""
        for name, md5 in self.md5.items():
            packed = self.folder / f"{name}.gz"
            if not packed.exists() and not (self.folder / name).exists():
                fetch(f"{self.address}{name}.gz", packed, md5)

    def read(self) -> tuple[Samples, Samples]:
        """The 60,000 training and 10,000 test images."""
        return self._read("train", self.train_size), self._read("t10k", self.test_size)

    def _read(self, part: str, size: int) -> Samples:
        images = read_idx(self._path(f"{part}-images-idx3-ubyte"), (size, *self.input_shape[1:]))
        path = self._path(f"{part}-labels-idx1-ubyte")
        labels = read_idx(path, (size,)).long()
        check_labels(labels, self.num_classes, path)
        return Samples(images[:, None], labels)

    def _path(self, name: str) -> Path:
        plain, packed = self.folder / name, self.folder / f"{name}.gz"
        return packed if packed.exists() and not plain.exists() else plain


class FashionMNIST(MNIST):
    """Zalando's articles, 28x28 grey, in MNIST's sizes and format; read from `root`/FashionMNIST/raw.

    Source: Xiao et al. 2017, arXiv:1708.07747. MD5s as torchvision has them.
    """

    pixel_mean = (0.2860 * 255,)
    pixel_std = (0.3530 * 255,)

    name = "FashionMNIST"
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    }


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 tensor of this shape in an idx file (packed if its name ends in .gz).

    The format: two zero bytes, 8 for "unsigned byte", the number of dimensions, each dimension as a big-endian int32,
    and then the values in row-major order.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has another size, or its header says another type or shape.
    """
    header = struct.pack(f">{len(shape) + 1}i", 0x0800 + len(shape), *shape)
    content = read_exactly(path, len(header) + math.prod(shape))
    if not content.startswith(header):
        raise ValueError(
            f"{path} is no idx file of unsigned bytes of shape {shape}: it begins with "
            f"{content[: len(header)].hex()}, not {header.hex()}. {REMEDY}"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=len(header)).view(shape)
