"""ImageNet, or any images in one folder a class: decoded and augmented by worker processes, exactly resumable."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsetrain.data.loader import ImageLoader
from sparsetrain.data.module import Place, SplitDataModule, Splits
from sparsetrain.data.split import split_digest, stratified_split
from sparsetrain.rng import derive_seed

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
LAYOUT = (
    "Images are read from <root>/train/<class>/*.JPEG and <root>/val/<class>/*.JPEG (or .jpg, .png, .webp), with the "
    "same classes in both; choose the folder by dataset.root=... ImageNet cannot be downloaded by the program: "
    "https://image-net.org/download.php says how to get it."
)


class Files(NamedTuple):
    """Labelled image files: their names below `folder`, bytes [N] in one array, and int64 [N].

    A list of a million `str` would be copied to every worker, as soon as it counts a reference to each.
    """

    folder: Path
    names: npt.NDArray[np.bytes_]
    labels: Tensor

    def take(self, index: Tensor) -> "Files":
        """The files at `index`, int64 [M]."""
        return Files(self.folder, self.names[index.numpy()], self.labels[index])

    def path(self, index: int) -> Path:
        """Of one file."""
        return self.folder / os.fsdecode(self.names[index])


class FileLoader(ImageLoader):
    """Batches of image files, decoded by worker processes; the augmentation of a sample is f(seed, epoch, its index).

    Wraps a plain `DataLoader` over the batches that are left of the epoch: resuming decodes none of those before, where
    torchdata's StatefulDataLoader would lose the epoch that follows a checkpoint at an epoch's last batch. All that a
    batch depends on is sent with it, so it is the same for any number of workers. Workers live as long as an iteration.

    Args:
        files: N >= 1 of them.
        transform: PIL image in RGB -> uint8 [3, H, W], the same H and W for all. It may draw from torch's global
            generator (as torchvision's do), which is seeded for each sample and put back after it.
        batch_size: see `ImageLoader`, as for the other arguments.
        num_workers: processes that decode; with 0 it is done between training steps.

    Raises:
        ValueError: what `ImageLoader` refuses, a negative number of workers, or in an iteration, a file that is no
            whole image.
    """

    def __init__(
        self,
        files: Files,
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            len(files.labels),
            3,
            batch_size=batch_size,
            mean=mean,
            std=std,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        _check_workers(num_workers)
        self.num_workers = num_workers
        self._decoded = _Decoded(files, transform)

    def raw_batches(self, share: Tensor, start: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        pinned = self.device.type == "cuda"
        loader = DataLoader(
            self._decoded,
            batch_size=None,
            sampler=(_Batch(self.part(share, index).tolist(), seed, epoch) for index in range(start, len(self))),
            num_workers=self.num_workers,
            pin_memory=pinned,
            generator=torch.Generator(),  # else the global one is drawn from, to seed the workers
        )
        for made in loader:
            if isinstance(made, UnreadableImageError):
                raise made
            images, labels = made
            yield images.to(self.device, non_blocking=pinned), labels.to(self.device, non_blocking=pinned)


class ImageFolder(SplitDataModule[Files]):
    """Images in one folder a class, as ImageNet's: cropped to one size, standardised by ImageNet's statistics.

    The images of `root`/train are trained on, less those held out for val, stratified by class; those of `root`/val,
    ImageNet's published validation images, are the test set, which nothing is chosen by. Classes are numbered by name.
    Training images are cropped at random (`RandomResizedCrop`: 8 to 100 % of the area) and mirrored at random; val and
    test images are resized and cropped at the centre. Needs torchvision.

    Args:
        root: folder above train and val.
        image_size: height and width of a batch's images, at least 1.
        eval_resize: shorter side of val and test images before their crop, at least `image_size`; None takes
            image_size / 0.875 (256 for 224).
        val_size: see `SplitDataModule`, as for the other arguments; 0 trains on all of `root`/train.
        num_workers: decoding processes of each loader on each rank; see `FileLoader`.

    Raises:
        FileNotFoundError, ValueError: an argument outside its range; when classes or files are first asked for, a
            folder that is missing or empty, or classes that differ between train and val.

    Source: Russakovsky et al. 2015, arXiv:1409.0575. Crops: Szegedy et al. 2015, arXiv:1409.4842, section 6.
    """

    pixel_mean = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    pixel_std = (0.229 * 255, 0.224 * 255, 0.225 * 255)

    def __init__(
        self,
        root: str | Path = "data/imagenet",
        *,
        image_size: int = 224,
        eval_resize: int | None = None,
        val_size: int = 10_000,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        num_workers: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            drop_last=drop_last,
            seed=seed,
        )
        eval_resize = round(image_size / 0.875) if eval_resize is None else eval_resize
        if not 1 <= image_size <= eval_resize:
            raise ValueError(
                f"image_size is {image_size} and eval_resize {eval_resize}; image_size must be at least 1, and "
                "eval_resize at least image_size, or the crop would have black edges."
            )
        _check_workers(num_workers)
        self.root = Path(root)
        self.input_shape = (3, image_size, image_size)
        self.eval_resize = eval_resize
        self.num_workers = num_workers

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; the place of a name is its label."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"The folder {self.root} does not exist. {LAYOUT}")
        train, val = (_class_names(self.root / part) for part in ("train", "val"))
        if train != val:
            raise ValueError(
                f"{self.root}/train has {len(train)} classes and {self.root}/val {len(val)}; "
                f"{_some(train - val)} only in train, {_some(val - train)} only in val. {LAYOUT}"
            )
        return tuple(sorted(train))

    @property
    def num_classes(self) -> int:
        """Class folders in `root`/train."""
        return len(self.classes)

    def split(self) -> Splits[Files]:
        """List the files, sorted by class and name, and hold val out."""
        files, test = self._list("train"), self._list("val")
        train, val = stratified_split(files.labels, self.val_size)
        names = hashlib.sha256(files.names.tobytes() + test.names.tobytes()).digest()
        digest = split_digest(
            train, files.labels[train], val, files.labels[val], test.labels, torch.tensor(list(names))
        )
        return Splits(files.take(train), files.take(val), test, digest)

    def loader(
        self, samples: Files, place: Place, *, batch_size: int, train: bool, shuffle: bool, drop_last: bool
    ) -> FileLoader:
        from torchvision.transforms import v2  # heavy, and needed for this set only

        size = self.input_shape[1]
        crop = (
            [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
            if train
            else [v2.Resize(self.eval_resize, antialias=True), v2.CenterCrop(size)]
        )
        return FileLoader(
            samples,
            v2.Compose([*crop, v2.PILToTensor()]),
            batch_size=batch_size,
            mean=self.pixel_mean,
            std=self.pixel_std,
            num_workers=self.num_workers,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            device=place.device,
        )

    def _list(self, part: str) -> Files:
        folder = self.root / part
        names: list[bytes] = []
        counts = []
        for name in self.classes:
            with os.scandir(folder / name) as entries:
                found = sorted(
                    entry.name
                    for entry in entries
                    if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
                )
            if not found:
                raise ValueError(f"The class folder {folder / name} holds no image. {LAYOUT}")
            names += (os.fsencode(f"{name}/{file}") for file in found)
            counts.append(len(found))
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Files(folder, np.array(names), labels)


class UnreadableImageError(ValueError):
    """A file that is no whole image."""


class _Batch(NamedTuple):
    """All that a batch is made from."""

    samples: list[int]
    seed: int
    epoch: int


@dataclass(frozen=True)
class _Decoded(Dataset[tuple[Tensor, Tensor] | UnreadableImageError]):
    """`_Batch` -> raw images uint8 [B, 3, H, W] and labels int64 [B], or the error that kept it from being made.

    The error is returned because one that a worker raises reaches the main process with a traceback for its message.
    """

    files: Files
    transform: Callable[[Any], Tensor]

    def __getitem__(self, batch: _Batch) -> tuple[Tensor, Tensor] | UnreadableImageError:
        images = []
        try:
            for index in batch.samples:
                image = _read(self.files.path(index))
                with _seeded(batch.seed, "augment", batch.epoch, index):
                    images.append(self.transform(image))
        except UnreadableImageError as error:
            return error
        return torch.stack(images), self.files.labels[batch.samples]


def _read(path: Path) -> Any:
    from torchvision.datasets.folder import pil_loader

    try:
        return pil_loader(path)
    except Exception as error:  # Pillow has no common base for what a broken file can raise
        raise UnreadableImageError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}). Put a whole copy in its place."
        ) from error


@contextmanager
def _seeded(seed: int, *names: int | str) -> Iterator[None]:
    """Let torch's global CPU generator run the stream called `names` within the block, and go on as before after it."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(seed, *names))  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _class_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist. {LAYOUT}")
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    if not names:
        raise ValueError(f"{folder} holds no class folder. {LAYOUT}")
    return names


def _some(names: set[str]) -> str:
    """The first three of them, and how many more there are."""
    shown = ", ".join(sorted(names)[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_workers(num_workers: int) -> None:
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 0, which decodes in the main process.")
