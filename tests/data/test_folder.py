"""Image files in class folders: what a batch is, the loader's contract with and without workers, and every refusal."""

import itertools
import multiprocessing
import random
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from conformance.harness import SaveEverywhere, TinyModule, assert_same, fit
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from sparsetrain.data import FileLoader, Flip, ImageFolder, InMemoryLoader
from sparsetrain.rng import derive_seed

CLASSES, TRAIN, TEST = ("ant", "bee", "cat"), 7, 2  # images of each class
SIZE = 4
WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]

Batches = list[tuple[Tensor, Tensor]]


def write_images(root: Path) -> Path:
    """Noise of many shapes, one a PNG in grey, beside files that are no images."""
    noise = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", TEST)):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("not an image")
            (folder / "._1.JPEG").write_text("what macOS leaves on foreign disks")
            for index in range(count):
                pixels = noise.integers(256, size=(8 + index, 14 - index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{index}.JPEG")
        Image.fromarray(pixels).convert("L").save(root / part / "ant" / "ant_0.png")
        (root / part / "ant" / "ant_0.JPEG").unlink()
        (root / part / ".cache").mkdir()
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_root(tmp_path) -> Path:
    return write_images(tmp_path)


def data(root: Path, **options) -> ImageFolder:
    options = {"image_size": SIZE, "val_size": 5, "batch_size": 5, "num_workers": 0, **options}
    return ImageFolder(root, **options)


def train_loader(root: Path, **options) -> FileLoader:
    """16 images: batches of 5, 5, 5 and 1."""
    return data(root, **options).train_dataloader()


def epoch(loader: FileLoader, number: int) -> Batches:
    loader.sampler.set_epoch(number)
    return list(loader)


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pairs in zip(left, right, strict=True) for a, b in zip(*pairs, strict=True)
    )


def raw(images: Tensor) -> Tensor:
    """The pixels that were standardised."""
    return images * torch.tensor(ImageFolder.pixel_std).view(3, 1, 1) + torch.tensor(ImageFolder.pixel_mean).view(
        3, 1, 1
    )


def test_classes_and_shape_are_known_from_the_folder_names_alone(root):
    module = data(root)
    assert (module.classes, module.num_classes, module.input_shape) == (CLASSES, 3, (3, SIZE, SIZE))
    assert "splits" not in vars(module)
    assert ImageFolder(root).input_shape == (3, 224, 224)
    assert ImageFolder(root).eval_resize == 256


def test_evaluation_batches_are_the_resized_and_cropped_images_of_each_split(root):
    module = data(root)
    for loader, files in (
        (module.val_dataloader(), module.splits.val),
        (module.test_dataloader(), module.splits.test),
    ):
        images = torch.cat([images for images, _ in loader])
        labels = torch.cat([labels for _, labels in loader])
        assert (images.shape[1:], images.dtype) == (module.input_shape, module.input_dtype)
        assert torch.equal(labels, files.labels)
        for index, image in enumerate(images):
            small = functional.resize(Image.open(files.path(index)).convert("RGB"), module.eval_resize)
            expected = functional.pil_to_tensor(functional.center_crop(small, [SIZE, SIZE]))
            assert torch.allclose(raw(image), expected.float(), atol=1e-3)
    assert [len(labels) for _, labels in module.test_dataloader()] == [5, 1]
    assert [module.splits.test.path(index).name for index in (0, 1)] == ["ant_0.png", "ant_1.JPEG"]


def test_a_training_image_is_the_random_crop_of_its_own_stream(root):
    module = data(root, seed=3)
    crop = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    loader = module.train_dataloader()
    order = loader._share(3, 2).tolist()
    images = torch.cat([images for images, _ in epoch(loader, 2)])
    with torch.random.fork_rng():
        for index, image in zip(order, images, strict=True):
            torch.manual_seed(derive_seed(3, "augment", 2, index))
            expected = crop(Image.open(module.splits.train.path(index)).convert("RGB"))
            assert torch.allclose(raw(image), expected.float(), atol=1e-3)


def test_batches_are_a_function_of_seed_and_epoch_alone(root):
    loader = train_loader(root, seed=3)
    zeroth, first = epoch(loader, 0), epoch(loader, 1)
    assert [images.shape for images, _ in zeroth] == [(size, 3, SIZE, SIZE) for size in (5, 5, 5, 1)]
    assert same(epoch(loader, 0), zeroth)
    assert same(epoch(train_loader(root, seed=3), 1), first)
    assert not same(zeroth, first)
    assert not same(epoch(train_loader(root, seed=4), 0), zeroth)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_batch(root):
    none, two = train_loader(root), train_loader(root, num_workers=2)
    assert all(same(epoch(none, number), epoch(two, number)) for number in (0, 1))


@pytest.mark.parametrize("workers", WORKERS)
def test_the_global_generators_are_left_alone_and_without_effect(root, workers):
    def states():
        return [torch.get_rng_state(), random.getstate(), np.random.get_state()]

    torch.manual_seed(0)
    before = states()
    batches = epoch(train_loader(root, num_workers=workers), 0)
    assert_same(states(), before)
    torch.manual_seed(1)
    assert same(epoch(train_loader(root, num_workers=workers), 0), batches)


@pytest.mark.parametrize("iterate_first", [False, True], ids=["load, iter", "iter, load"])
@pytest.mark.parametrize("done", range(9))
def test_resuming_after_any_batch_continues_the_stream_bit_for_bit(root, done, iterate_first):
    _check_resume(root, done, workers=0, iterate_first=iterate_first)


@pytest.mark.slow
@pytest.mark.parametrize("done", [2, 4])
def test_resuming_with_workers_continues_the_stream_bit_for_bit(root, done):
    _check_resume(root, done, workers=2, iterate_first=True)


def _check_resume(root: Path, done: int, *, workers: int, iterate_first: bool) -> None:
    loader = train_loader(root)
    stream = [batch for number in range(3) for batch in epoch(loader, number)]
    interrupted = train_loader(root, num_workers=workers)
    number, rest = divmod(done, 4)
    for past in range(number):
        epoch(interrupted, past)
    if rest:
        interrupted.sampler.set_epoch(number)
        list(itertools.islice(interrupted, rest))
    resumed = train_loader(root, num_workers=workers)
    iterator = iter(resumed) if iterate_first else None
    resumed.load_state_dict(interrupted.state_dict())
    resumed.sampler.set_epoch(number)
    tail = list(iterator if iterator is not None else resumed)
    tail += [batch for later in range(number + 1, 3) for batch in epoch(resumed, later)]
    assert same(tail, stream[done:])


def test_resuming_decodes_no_image_of_the_batches_before(root, monkeypatch):
    read = []
    monkeypatch.setattr("sparsetrain.data.folder._read", lambda path: read.append(path) or Image.new("RGB", (9, 9)))
    loader = train_loader(root)
    loader.load_state_dict({"epoch": 0, "batch": 2})
    assert len(list(loader)) == 2
    assert len(read) == 6


def test_state_counts_the_batches_handed_out_not_those_decoded_ahead(root):
    loader = train_loader(root)
    loader.sampler.set_epoch(7)
    assert [loader.state_dict() for _ in loader] == [{"epoch": 7, "batch": batch} for batch in (1, 2, 3, 0)]
    with pytest.raises(ValueError, match=r"has 4 here\. Resume with the data, batch size"):
        loader.load_state_dict({"epoch": 0, "batch": 4})


@pytest.mark.parametrize("workers", WORKERS)
def test_reseed_gives_an_epoch_the_stream_of_the_new_seed_counted_from_epoch0(root, workers):
    loader = train_loader(root, seed=0, num_workers=workers)
    list(itertools.islice(loader, 1))
    loader.reseed(9, epoch0=4)
    assert same(epoch(loader, 6), epoch(train_loader(root, seed=9), 2))
    assert loader.state_dict() == {"epoch": 6, "batch": 0}


@pytest.mark.slow
def test_no_worker_outlives_its_iteration(root):
    loader = train_loader(root, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert multiprocessing.active_children() == []
    list(loader)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_as_those_of_an_in_memory_loader(root, drop_last):
    def on_rank(rank: int) -> ImageFolder:
        module = data(root, batch_size=3, val_size=4, drop_last=drop_last)  # 17 images to train on
        module.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": 2},
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            overfit_batches=0,
        )
        return module

    for rank in (0, 1):
        module = on_rank(rank)
        labels = module.splits.train.labels
        twin = InMemoryLoader(
            torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8),
            labels,
            batch_size=3,
            mean=(0.0,),
            std=(1.0,),
            augment=(Flip(),),
            shuffle=True,
            drop_last=drop_last,
            rank=rank,
            world_size=2,
        )
        ours = [labels.tolist() for _, labels in epoch(module.train_dataloader(), 1)]
        assert ours == [labels.tolist() for _, labels in epoch(twin, 1)]
    tested = [torch.cat([images for images, _ in on_rank(rank).test_dataloader()]) for rank in (0, 1)]
    alone = torch.cat([images for images, _ in data(root).test_dataloader()])
    assert [len(images) for images in tested] == [3, 3]
    assert torch.equal(torch.stack(tested, dim=1).flatten(0, 1), alone)


def test_the_split_is_fixed_and_its_hash_names_its_files(own_root):
    first, second, other = data(own_root, seed=1), data(own_root, seed=2), data(own_root, val_size=4)
    assert first.split_hash == second.split_hash != other.split_hash
    assert first.splits.val.names.tolist() == second.splits.val.names.tolist()
    assert len(first.split_hash) == 16
    everything = [*first.splits.train.names.tolist(), *first.splits.val.names.tolist()]
    assert sorted(everything) == sorted(f"{p.parent.name}/{p.name}".encode() for p in images(own_root / "train"))
    assert torch.bincount(first.splits.val.labels).tolist() == [2, 2, 1]
    renamed = own_root / "val" / "bee" / "bee_1.JPEG"
    renamed.rename(renamed.with_name("bee_9.JPEG"))
    assert data(own_root).split_hash != first.split_hash


def images(folder: Path) -> list[Path]:
    found = [*folder.glob("*/*.JPEG"), *folder.glob("*/*.png")]
    return [path for path in found if not path.name.startswith(".")]


def test_without_val_every_file_is_trained_on(root):
    module = data(root, val_size=0)
    assert len(module.splits.train.labels) == len(CLASSES) * TRAIN
    assert module.val_dataloader() == []


def test_a_list_of_file_names_takes_one_array(root):
    names = data(root).splits.train.names  # a list would be copied to each worker, name by name
    assert names.dtype.kind == "S"
    assert names.shape == (16,)


class ColourModule(TinyModule):
    """Takes colour images of SIZE x SIZE."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0] = nn.Conv2d(3, 4, 3, padding=1)


OWN_HOOK = "ignore:You have overridden `on_after_batch_transfer`:UserWarning"  # the harness's modules do


@pytest.mark.slow
@pytest.mark.filterwarnings(OWN_HOOK)
@pytest.mark.parametrize("workers", WORKERS)
def test_a_fit_resumed_from_any_checkpoint_is_the_uninterrupted_one(root, tmp_path, workers):
    def run(*callbacks: L.Callback, ckpt_path: Path | None = None):
        loaded = {"datamodule": data(root, num_workers=workers)}
        return fit(*callbacks, make=ColourModule, data=loaded, ckpt_path=ckpt_path, max_epochs=2)

    saver = SaveEverywhere(tmp_path)
    full = run(saver)
    assert len(full.trace.batches) == 8
    for saved in saver.saved[:: 4 if workers else 1]:
        part = run(SaveEverywhere(tmp_path / "again"), ckpt_path=saved.path)
        assert_same(part.outcome(), full.outcome())
        assert_same(part.trace.batches, {n: v for n, v in full.trace.batches.items() if n > saved.batches})
    assert multiprocessing.active_children() == []


class PrintShares(L.Callback):
    """Writes the sizes of this rank's training batches and the sums of the images that it validated on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: list[int] = []
        self.sums: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.sizes.append(len(batch[0]))

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.sums += batch[0].sum((1, 2, 3)).tolist()

    def on_train_end(self, trainer, module) -> None:
        torch.save((self.sizes, self.sums), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings(OWN_HOOK, "ignore:It is recommended to use `self.log:UserWarning")
def test_two_processes_share_the_files_under_the_default_sampler_option(root, tmp_path):
    module = data(root, batch_size=4)
    options = {"max_epochs": 1, "strategy": "ddp_spawn", "devices": 2}
    fit(PrintShares(tmp_path), make=ColourModule, data={"datamodule": module}, **options)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [sizes for sizes, _ in ranks] == [[4, 4], [4, 4]]
    whole = torch.cat([images for images, _ in data(root).val_dataloader()]).sum((1, 2, 3))
    assert sorted(ranks[0][1] + ranks[1][1]) == pytest.approx(sorted(whole.tolist()), abs=1e-4)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("harm", ["truncated", "empty", "text", "gone"])
def test_a_file_that_is_no_whole_image_is_named(own_root, harm, workers):
    path = own_root / "val" / "bee" / "bee_1.JPEG"
    module = data(own_root, num_workers=workers)
    module.setup("test")
    content = {"truncated": path.read_bytes()[:-40], "empty": b"", "text": b"words"}
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[harm])
    with pytest.raises(ValueError, match=rf"^{path} cannot be read as an image \(.*\)\. Put a whole copy in its place"):
        list(module.test_dataloader())


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda root: root.rename(root.with_name("other")), FileNotFoundError, r"The folder {root} does not exist\."),
        (
            lambda root: (root / "train").rename(root / "training"),
            FileNotFoundError,
            r"The folder {root}/train does not exist\.",
        ),
        (
            lambda root: (root / "val").rename(root / "test"),
            FileNotFoundError,
            r"The folder {root}/val does not exist\.",
        ),
        (
            lambda root: (
                [path.rename(root / "val" / path.name) for path in sorted((root / "val").iterdir())[1:]]
                and [(root / "val" / name).rename(root / name) for name in CLASSES]
            ),
            ValueError,
            r"{root}/val holds no class folder\.",
        ),
        (
            lambda root: (root / "val" / "cat").rename(root / "val" / "cow"),
            ValueError,
            r"{root}/train has 3 classes and {root}/val 3; cat only in train, cow only in val\.",
        ),
        (
            lambda root: [path.unlink() for path in images(root / "train") if path.parent.name == "bee"],
            ValueError,
            r"The class folder {root}/train/bee holds no image\.",
        ),
    ],
    ids=["no root", "no train", "no val", "flat val", "other classes", "empty class"],
)
def test_another_layout_is_refused_with_the_one_expected(tmp_path, harm, error, message):
    root = write_images(tmp_path / "images")
    harm(root)
    with pytest.raises(error, match=message.format(root=root) + r" Images are read from <root>/train/.*dataset\.root="):
        data(root).setup("fit")


def test_many_differing_classes_are_counted(own_root):
    for name in "defgh":
        (own_root / "val" / name).mkdir()
    with pytest.raises(ValueError, match="none only in train, d, e, f and 2 more only in val"):
        _ = data(own_root).num_classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; it must be at least 1"),
        ({"val_size": -1}, "val_size is -1; it must be at least 0"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"eval_resize": 3}, "image_size is 4 and eval_resize 3; .* eval_resize at least image_size"),
    ],
)
def test_arguments_outside_their_range_are_refused_at_construction(root, options, message):
    with pytest.raises(ValueError, match=message):
        data(root, **options)


def test_a_val_split_of_everything_is_refused(root):
    with pytest.raises(ValueError, match="Cannot hold 21 of 21 samples out"):
        data(root, val_size=21).setup("fit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_on_the_cpu_and_its_generator_is_left_alone(root, workers):
    files = data(root).splits.train
    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.PILToTensor()])
    options = {"batch_size": 5, "mean": (120.0,) * 3, "std": (60.0,) * 3, "shuffle": True}
    on_cpu = FileLoader(files, transform, **options)
    on_gpu = FileLoader(files, transform, num_workers=workers, device="cuda", **options)
    before = torch.cuda.get_rng_state()
    batches = epoch(on_gpu, 1)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert {images.device.type for images, _ in batches} == {"cuda"}
    assert same([(images.cpu(), labels.cpu()) for images, labels in batches], epoch(on_cpu, 1))
