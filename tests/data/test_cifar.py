import hashlib
import io
import tarfile

import pytest
import torch

from sparsetrain.data import CIFAR10, CIFAR100, Flip, Shift

COUNT = 20  # records in each file


def record_file(module: type[CIFAR10], seed: int) -> bytes:
    stream = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (COUNT, 3072), generator=stream)
    labels = torch.arange(COUNT)[:, None] % module.num_classes
    coarse = torch.full((COUNT, module.label_bytes - 1), 19)
    return bytes(torch.cat([coarse, labels, pixels], dim=1).flatten().tolist())


@pytest.fixture(params=[CIFAR10, CIFAR100])
def module(request, monkeypatch):
    monkeypatch.setattr(request.param, "records", dict.fromkeys(request.param.records, COUNT))
    return request.param


@pytest.fixture
def folder(module, tmp_path):
    folder = tmp_path / module.folder_name
    folder.mkdir()
    for seed, name in enumerate(module.records):
        (folder / name).write_bytes(record_file(module, seed))
    return folder


def test_reads_label_and_pixels_of_every_record(module, folder, tmp_path):
    data = module(tmp_path, val_size=0)
    train, _, test, _ = data.splits
    *parts, last = module.records
    assert train.images.shape == (COUNT * len(parts), 3, 32, 32)
    assert train.labels.tolist() == [index % module.num_classes for index in range(COUNT)] * len(parts)
    assert test.labels.tolist() == [index % module.num_classes for index in range(COUNT)]
    size = module.label_bytes + 3072
    for samples, index, name in ((train, 3, parts[0]), (test, 7, last)):
        content = (folder / name).read_bytes()[index * size : (index + 1) * size]
        assert bytes(samples.images[index].flatten().tolist()) == content[module.label_bytes :]


@pytest.mark.parametrize("size", [16, 8])
def test_smaller_images_are_means_of_squares_with_statistics_of_their_own(module, folder, tmp_path, size):
    whole, small = module(tmp_path, val_size=0), module(tmp_path, val_size=0, size=size)
    side = 32 // size
    squares = whole.splits.train.images.double().reshape(-1, 3, size, side, size, side)
    assert small.splits.train.images.dtype == torch.uint8
    assert torch.equal(small.splits.train.images.double(), squares.mean((3, 5)).round())
    assert (small.input_shape, whole.input_shape) == ((3, size, size), (3, 32, 32))
    plain = module(tmp_path, val_size=0, size=size, shift=0, flip=False, batch_size=len(small.splits.train.images))
    batch = next(iter(plain.train_dataloader()))[0]
    assert torch.allclose(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(batch.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_a_size_that_does_not_halve_the_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size=24; images of 32x32 pixels can be made 32, 16, 8 wide"):
        CIFAR10(tmp_path, size=24)


def archive(module: type[CIFAR10]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        names = [f"{module.folder_name}/{name}" for name in module.records]
        for seed, name in enumerate([*names, "../outside.bin"]):
            content = record_file(module, seed)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_prepare_data_takes_the_missing_files_and_nothing_else_out_of_the_archive(module, tmp_path, monkeypatch):
    content = archive(module)
    source = tmp_path / "mirror" / "packed.tar.gz"
    source.parent.mkdir()
    source.write_bytes(content)
    monkeypatch.setattr(module, "address", source.as_uri())
    monkeypatch.setattr(module, "md5", hashlib.md5(content).hexdigest())
    root = tmp_path / "root"
    data = module(root, val_size=0)
    data.prepare_data()
    folder = root / module.folder_name
    assert sorted(path.name for path in folder.iterdir()) == sorted(module.records)
    assert not (tmp_path / "outside.bin").exists()
    assert len(data.splits.test.labels) == COUNT

    source.unlink()  # from now on the archive in the root serves, and files that are there stay
    first, *_ = module.records
    (folder / first).unlink()
    data.prepare_data()
    assert (folder / first).read_bytes() == record_file(module, 0)


def test_a_broken_archive_is_refused_and_nothing_taken_from_it(module, tmp_path):
    path = tmp_path / module.address.rsplit("/", 1)[1]
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"{path} is corrupt or incomplete.*\(4 bytes\).* Delete it"):
        module(tmp_path).prepare_data()
    assert list(tmp_path.iterdir()) == [path]


def test_a_truncated_file_and_a_false_label_are_errors_with_path_and_remedy(module, folder, tmp_path):
    *_, last = module.records
    path, size = folder / last, COUNT * (module.label_bytes + 3072)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f"{path} holds {size - 7:,} bytes where {size:,} are expected. Delete it"):
        module(tmp_path, val_size=0).setup("fit")
    label = module.label_bytes - 1
    path.write_bytes(whole[:label] + b"\xff" + whole[label + 1 :])
    with pytest.raises(ValueError, match=f"{path} is corrupt: it holds label 255.* Delete it"):
        module(tmp_path, val_size=0).setup("fit")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
        module(tmp_path, val_size=0).setup("fit")


def test_the_augmentation_of_the_usual_recipe_is_the_default():
    assert CIFAR10().augment == (Shift(4), Flip())
    assert CIFAR10(shift=0).augment == (Flip(),)
    assert CIFAR100(flip=False, shift=2).augment == (Shift(2),)
