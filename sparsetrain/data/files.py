"""Data files: fetched with a checksum, read with their size checked, never left half-written."""

import gzip
import hashlib
import http.client
import os
import shutil
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

REMEDY = "Delete it and run again to download it, or put a whole copy in its place."


def fetch(url: str, target: Path, md5: str) -> None:
    """Download `url` to `target`, which appears only once it is whole and its checksum is right.

    Raises:
        ConnectionError: the address cannot be read (offline, moved, interrupted) or the file not be written.
        ValueError: the file that came has another MD5.
    """
    rank_zero_info(f"Downloading {url} to {target}")
    try:
        with whole_or_nothing(target) as file:
            with urllib.request.urlopen(url, timeout=60) as response:
                shutil.copyfileobj(response, file)
            file.flush()
            check_md5(Path(file.name), md5, remedy=f"Run again, or fetch {url} yourself and put it at {target}.")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url} could not be downloaded ({error}). Fetch it on a machine that can, and put it at {target}."
        ) from error


def check_md5(path: Path, md5: str, *, remedy: str) -> None:
    """Raise ValueError with `remedy` unless the file has this MD5, in hexadecimal."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is corrupt or incomplete: its MD5 is {found} ({path.stat().st_size:,} bytes), the published one "
            f"{md5}. {remedy}"
        )


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[BinaryIO]:
    """A new file, moved to `target` when the block ends well, and deleted when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_exactly(path: Path, size: int) -> bytearray:
    """The file's contents, unpacked if its name ends in .gz, which must be `size` bytes.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has another size, or cannot be unpacked.
    """
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing. Call prepare_data() to download it (a Trainer does), or put the file there."
        ) from None
    try:
        content = gzip.decompress(packed) if path.suffix == ".gz" else packed
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} ({len(packed):,} bytes) cannot be unpacked: {error}. {REMEDY}") from error
    if len(content) != size:
        raise ValueError(f"{path} holds {len(content):,} bytes where {size:,} are expected. {REMEDY}")
    return bytearray(content)


def check_labels(labels: Tensor, num_classes: int, path: Path) -> None:
    """Raise ValueError if a label read from `path` is no class: the size was right, the contents are not."""
    if labels.max() >= num_classes:
        raise ValueError(
            f"{path} is corrupt: it holds label {int(labels.max())}, and the largest is {num_classes - 1}. {REMEDY}"
        )
