import gzip
import hashlib
import struct

import pytest
import torch

from sparsetrain.data import MNIST, FashionMNIST, Shift

TRAIN, TEST = 60, 20


def idx(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">i", size) for size in values.shape)
    return header + bytes(values.flatten().tolist())


def contents() -> dict[str, bytes]:
    stream = torch.Generator().manual_seed(0)
    files = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images = torch.randint(256, (count, 28, 28), generator=stream)
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        files[f"{part}-labels-idx1-ubyte"] = idx(torch.arange(count) % 10)
    return files


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(MNIST, "train_size", TRAIN)
    monkeypatch.setattr(MNIST, "test_size", TEST)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in contents().items():
        (folder / name).write_bytes(content)
    return folder


def test_reads_images_and_labels_of_plain_and_packed_files(tmp_path, folder):
    plain = MNIST(tmp_path, val_size=10).splits
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = MNIST(tmp_path, val_size=10).splits
    for split, other in zip(plain[:3], packed[:3], strict=True):
        assert torch.equal(split.images, other.images)
        assert torch.equal(split.labels, other.labels)
    assert plain.digest == packed.digest
    assert [len(split.labels) for split in plain[:3]] == [50, 10, 20]
    raw = contents()["t10k-images-idx3-ubyte"][16:]
    assert plain.test.images.shape == (TEST, 1, 28, 28)
    assert bytes(plain.test.images.flatten().tolist()) == raw


def test_fashion_mnist_lies_in_its_own_folder(tmp_path, folder):
    folder.parent.rename(tmp_path / "FashionMNIST")
    assert len(FashionMNIST(tmp_path, val_size=10).splits.train.labels) == 50
    with pytest.raises(FileNotFoundError, match="MNIST/raw/train-images-idx3-ubyte is missing"):
        MNIST(tmp_path).setup("fit")


def test_prepare_data_downloads_only_what_is_missing(tmp_path, folder, monkeypatch):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    name = "t10k-labels-idx1-ubyte"
    packed = gzip.compress(contents()[name])
    (mirror / f"{name}.gz").write_bytes(packed)
    monkeypatch.setattr(MNIST, "address", mirror.as_uri() + "/")
    monkeypatch.setitem(MNIST.md5, name, hashlib.md5(packed).hexdigest())
    (folder / name).unlink()
    module = MNIST(tmp_path, val_size=10)
    module.prepare_data()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(set(contents()) - {name}), f"{name}.gz"])
    assert len(module.splits.test.labels) == TEST


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda c: c[:-1], "holds 47,055 bytes where 47,056 are expected"),
        ("train-images-idx3-ubyte", lambda c: b"\1" + c[1:], "begins with 01000803"),
        ("t10k-labels-idx1-ubyte", lambda c: c[:-1] + b"\x0a", "holds label 10, and the largest is 9"),
    ],
)
def test_a_broken_file_is_one_error_with_its_path_and_remedy(tmp_path, folder, name, change, message):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{folder / name} .*{message}.* Delete it and run again"):
        MNIST(tmp_path, val_size=10).setup("fit")


def test_shift_is_an_option():
    assert MNIST().augment == ()
    assert MNIST(shift=2).augment == (Shift(2),)
