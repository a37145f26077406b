"""The data module under a real Trainer: who sees what, and resume from the checkpoint of every moment."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.loop import _Loop
from torch import Tensor

from sparsetrain.data import InMemoryDataModule, Samples, Synthetic
from sparsetrain.data.in_memory import channel_statistics

EPOCHS = 3


def data(**options) -> Synthetic:
    options = {"train_size": 11, "val_size": 5, "test_size": 6, "batch_size": 4, "shift": 1, "flip": True, **options}
    return Synthetic((1, 4, 4), 2, **options)


class Recorder(L.LightningModule):
    """Trains one number and keeps every batch that it was given."""

    def __init__(self, *, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ask_for_steps = ask_for_steps
        self.trained: list[tuple[Tensor, Tensor]] = []
        self.validated: list[Tensor] = []
        self.tested: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.trained.append(batch)
        return (self.weight - batch[0].mean()).square()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.tested.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:
            assert self.trainer.estimated_stepping_batches > 0  # makes Lightning build the loaders before it restores
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtEveryMoment(L.Callback):
    """A checkpoint after each batch, validation and epoch: (steps done, file)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[int, Path]] = []

    def save(self, trainer: L.Trainer, moment: str) -> None:
        path = self.folder / f"{trainer.global_step}-{moment}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((trainer.global_step, path))

    def on_train_batch_end(self, trainer, *args) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *args) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *args) -> None:
        self.save(trainer, "epoch")


class CompleteTheRestore(L.Callback):
    """What an exact resume has to do beside Lightning."""

    def on_train_start(self, trainer, *args) -> None:
        loop = trainer.fit_loop
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        if loop.restarted_on_epoch_end:
            # With max_steps Lightning takes the finished epoch up again, runs none of it and counts it twice.
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            _Loop.restarting.fset(loop, False)


def trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def equal(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pairs in zip(left, right, strict=True) for a, b in zip(*pairs, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "steps"), [({}, 9), ({"limit_train_batches": 2}, 6), ({"max_epochs": -1, "max_steps": 8}, 8)], ids=str
)
@pytest.mark.parametrize("ask_for_steps", [False, True])
def test_a_run_resumed_at_any_moment_trains_on_the_batches_of_the_uninterrupted_run(
    tmp_path, length, steps, ask_for_steps
):
    whole, saver = Recorder(ask_for_steps=ask_for_steps), SaveAtEveryMoment(tmp_path)
    trainer(saver, **length).fit(whole, datamodule=data())
    assert len(whole.trained) == steps
    for done, path in saver.saved:
        resumed = Recorder(ask_for_steps=ask_for_steps)
        restore = [CompleteTheRestore()] if ask_for_steps or "max_steps" in length else []
        trainer(*restore, **length).fit(resumed, datamodule=data(), ckpt_path=path)
        assert equal(resumed.trained, whole.trained[done:]), path.name
        assert torch.equal(resumed.weight, whole.weight), path.name


def test_a_checkpoint_counts_the_batches_trained_on_and_none_fetched_ahead(tmp_path):
    saver = SaveAtEveryMoment(tmp_path)
    trainer(saver, max_epochs=2, limit_val_batches=0).fit(Recorder(), datamodule=data())
    states = [torch.load(path)["loops"]["fit_loop"]["state_dict"]["combined_loader"] for _, path in saver.saved]
    batches = [[{"epoch": epoch, "batch": batch}] for epoch in (0, 1) for batch in (1, 2, 0, 0)]
    assert states == batches  # the second 0 of an epoch is the checkpoint at its end


def test_every_epoch_trains_on_each_sample_once_and_in_another_order():
    module = Recorder()
    trainer(max_epochs=2).fit(module, datamodule=data(train_size=12, shift=0, flip=False))
    epochs = [torch.cat([images for images, _ in module.trained[first : first + 3]]) for first in (0, 3)]
    assert not torch.equal(*epochs)
    assert torch.equal(*(torch.unique(images, dim=0) for images in epochs))
    assert len(torch.unique(epochs[0], dim=0)) == 12


def test_evaluation_is_whole_in_every_epoch_after_sanity_checks_too():
    module, module_data = Recorder(), data(eval_batch_size=2)
    fit = trainer(max_epochs=2, num_sanity_val_steps=2)
    fit.fit(module, datamodule=module_data)
    sanity, epochs = module.validated[:2], module.validated[2:]
    assert len(epochs) == 6
    assert torch.equal(torch.cat(epochs[:3]), torch.cat(epochs[3:]))
    assert torch.equal(torch.cat(sanity), torch.cat(epochs)[:4])
    fit.test(module, datamodule=module_data, verbose=False)
    assert [len(images) for images in module.tested] == [2, 2, 2]


def test_without_a_val_split_there_is_no_validation():
    module = Recorder()
    with pytest.warns(UserWarning, match="length of `list` across ranks is zero"):
        trainer(max_epochs=1).fit(module, datamodule=data(val_size=0))
    assert len(module.trained) == 3
    assert module.validated == []


def test_overfit_batches_trains_on_the_same_samples_in_every_epoch():
    module = Recorder()
    with pytest.warns(UserWarning, match="turning off"):
        trainer(max_epochs=2, overfit_batches=2, limit_val_batches=0).fit(module, datamodule=data())
    labels = torch.cat([labels for _, labels in module.trained])
    assert torch.equal(labels[:8], labels[8:])


class PrintShares(L.Callback):
    """Writes which samples this rank trained and validated on, one a line; a sample is known by its sum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, module) -> None:
        images = torch.cat([images for images, _ in module.trained])
        shares = (images.sum((1, 2, 3)).tolist(), torch.cat(module.validated).sum((1, 2, 3)).tolist())
        sizes = ([len(images) for images, _ in module.trained], [len(images) for images in module.validated])
        torch.save((shares, sizes), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log:UserWarning")
def test_two_ranks_share_training_and_validation_samples_under_the_default_sampler_option(tmp_path):
    module_data = data(train_size=11, val_size=5, batch_size=3, shift=0, flip=False)
    fit = trainer(PrintShares(tmp_path), max_epochs=1, strategy="ddp_spawn", devices=2)
    fit.fit(Recorder(), datamodule=module_data)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    everything = data(train_size=11, val_size=5, shift=0, flip=False)
    everything.setup("fit")
    train, val = (
        torch.cat([images for images, _ in loader]).sum((1, 2, 3)).tolist()
        for loader in (everything.train_dataloader(), everything.val_dataloader())
    )
    assert [sizes for _, sizes in ranks] == [([3, 3], [3]), ([3, 3], [2])]
    trained, validated = (sorted(value for shares, _ in ranks for value in shares[part]) for part in (0, 1))
    assert validated == pytest.approx(sorted(val), abs=1e-4)
    assert len(trained) == 12
    assert sorted(set(trained)) == pytest.approx(sorted(train), abs=1e-4)


def test_the_split_is_fixed_and_its_hash_names_it():
    first, second, other = data(seed=1), data(seed=2), data(val_size=4)
    assert first.split_hash == second.split_hash != other.split_hash
    assert torch.equal(first.splits.val.images, second.splits.val.images)
    assert len(first.split_hash) == 16


def test_val_and_train_are_disjoint_and_together_all_that_was_read():
    module_data = data(train_size=30, val_size=10)
    train, val, _, _ = module_data.splits
    read, _ = module_data.read()
    together = torch.cat([train.images, val.images]).flatten(1).tolist()
    assert sorted(together) == sorted(read.images.flatten(1).tolist())


def test_channel_statistics_are_the_mean_and_deviation_of_the_pixels():
    images = torch.randint(256, (50, 3, 6, 5)).byte()
    mean, std = channel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist())
    assert std == pytest.approx(pixels.std(1, correction=0).tolist())


def test_published_statistics_are_used_where_a_subclass_gives_them():
    class Tiny(InMemoryDataModule):
        num_classes, input_shape = 2, (1, 1, 1)
        pixel_mean, pixel_std = (1.0,), (2.0,)

        def read(self) -> tuple[Samples, Samples]:
            samples = Samples(torch.full((4, 1, 1, 1), 5, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
            return samples, samples

    images, _ = next(iter(Tiny().test_dataloader()))
    assert (images.shape[1:], images.dtype) == (Tiny.input_shape, Tiny.input_dtype)
    assert images.flatten().tolist() == [2.0] * 4


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size"])
def test_a_batch_of_no_samples_is_refused_at_construction(option):
    with pytest.raises(ValueError, match=f"{option} is 0; it must be at least 1"):
        data(**{option: 0})


def test_a_val_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="val_size is -1"):
        data(val_size=-1)
    with pytest.raises(NotImplementedError, match="must say how its images are read"):
        InMemoryDataModule().setup("fit")
