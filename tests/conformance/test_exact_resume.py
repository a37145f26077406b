"""A run killed at any moment and resumed from its last checkpoint ends bit-identical to the uninterrupted one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import (
    BATCH,
    PlainModule,
    Run,
    Saved,
    SaveEverywhere,
    SaveNowhere,
    TinyModule,
    differences,
    fit,
    loaders,
    samples,
)
from conformance.methods import METHODS, every_method
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from sparsetrain.data import InMemoryLoader

Make = Callable[[], list[L.Callback]]


def dense() -> list[L.Callback]:
    return []


def gradual() -> list[L.Callback]:
    return [METHODS[0].make()]


@dataclass(frozen=True)
class Setting:
    """How the run is trained.

    Args:
        name: what the tests' names say.
        schedule: of the learning rate.
        trainer: arguments of the Trainer.
    """

    name: str
    schedule: str = "one_cycle"
    trainer: Mapping[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("step_lr", "epoch"),
    Setting("plateau", "plateau"),
    Setting("limit_train_batches", trainer={"limit_train_batches": 4}),
    Setting("val_check_interval", trainer={"val_check_interval": 2}),
    Setting("plateau_val_check_interval", "plateau", trainer={"val_check_interval": 2}),
    Setting("check_val_every_n_epoch", trainer={"check_val_every_n_epoch": 2}),
    Setting("no_validation", trainer={"limit_val_batches": 0}),
    Setting("max_steps", trainer={"max_epochs": -1, "max_steps": 13}),
    Setting("accumulate", trainer={"accumulate_grad_batches": 2}),
    Setting("accumulate_val_check_interval", "epoch", trainer={"accumulate_grad_batches": 2, "val_check_interval": 3}),
)
DEFAULT = Setting("one_cycle")


def resumed_differences(full: Run, part: Run, saved: Saved) -> Iterator[str]:
    """What the run `part`, resumed from `saved`, did otherwise than `full`, or left out."""
    yield from differences(full.outcome(), part.outcome())
    due = {n: v for n, v in full.trace.batches.items() if n > saved.batches}
    yield from differences(due, part.trace.batches, "batches")
    pending = saved.batches if saved.moment == "batch" else saved.batches + 1
    due_validations = {n: v for n, v in full.trace.validations.items() if n >= pending}
    yield from differences(due_validations, part.trace.validations, "validations")


def resume_everywhere(
    folder: Path,
    make: Make,
    setting: Setting = DEFAULT,
    *,
    data: Callable[[], Mapping[str, Any]] | None = None,
    moments: Callable[[Saved], bool] = lambda saved: True,
    exact: bool = True,
) -> dict[str, list[str]]:
    """Checkpoint -> what a run resumed from it did otherwise, for each one of an uninterrupted run."""

    def train(*callbacks: L.Callback, ckpt_path: Path | None = None) -> Run:
        loaded = None if data is None else data()
        module = partial(TinyModule, schedule=setting.schedule)
        return fit(*make(), *callbacks, make=module, data=loaded, ckpt_path=ckpt_path, exact=exact, **setting.trainer)

    saver = SaveEverywhere(folder)
    full = train(saver)
    unsaved = train(SaveNowhere())
    found = {}
    for saved in filter(moments, saver.saved):
        part = train(SaveNowhere(), ckpt_path=saved.path)
        found[saved.path.name] = list(resumed_differences(full, part, saved))
    assert len(found) >= 3
    found["saving"] = list(differences(full.outcome(), unsaved.outcome()))  # it changes nothing
    return {name: list_ for name, list_ in found.items() if list_}


@pytest.mark.slow
@every_method
def test_each_checkpoint_resumes_bit_identically(tmp_path, method):
    assert not resume_everywhere(tmp_path, lambda: [method.make()])


@pytest.mark.slow
@pytest.mark.parametrize("make", [gradual, dense])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_checkpoint_resumes_bit_identically_in_every_setting(tmp_path, make, setting):
    assert not resume_everywhere(tmp_path, make, setting)


@pytest.mark.slow
def test_the_dense_control_resumes_bit_identically(tmp_path):
    assert not resume_everywhere(tmp_path, dense)


def test_a_run_with_weight_averaging_resumes_with_the_same_weights_and_masks(tmp_path):
    def make() -> list[L.Callback]:
        return [*gradual(), EMAWeightAveraging(decay=0.5)]

    assert not resume_everywhere(tmp_path, make, moments=lambda saved: saved.batches in (7, 10, 12))


@pytest.mark.slow
@pytest.mark.parametrize("make", [gradual, dense])
def test_without_exact_resume_some_checkpoint_gives_another_run(tmp_path, make):
    found = resume_everywhere(tmp_path, make, exact=False)
    assert any("module/body.0.weight" in difference for list_ in found.values() for difference in list_)


def plain_data(*, seeded: bool = False) -> dict[str, Any]:
    """Loaders of torch; `seeded`, that for training has a generator of its own."""
    images, labels = samples()
    data = TensorDataset(images.float() / 128 - 1, labels)
    stream = torch.Generator().manual_seed(5) if seeded else None
    return {
        "train_dataloaders": DataLoader(data, BATCH, shuffle=True, num_workers=0, generator=stream),
        "val_dataloaders": DataLoader(data, BATCH, num_workers=0),
    }


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
class TestPlainDataLoader:
    def test_it_resumes_bit_identically_at_epoch_ends(self, tmp_path):
        assert not resume_everywhere(tmp_path, gradual, data=plain_data, moments=lambda saved: saved.batches % 5 == 0)

    @pytest.mark.parametrize("seeded", [False, True])
    @pytest.mark.parametrize("method", [m for m in METHODS if m.name in ("rounds", "soup")], ids=lambda m: m.name)
    def test_rounds_resume_bit_identically_at_their_ends(self, tmp_path, method, seeded):
        data = partial(plain_data, seeded=seeded)
        at_ends = partial(resume_everywhere, tmp_path, lambda: [method.make()], data=data)
        assert not at_ends(moments=lambda saved: saved.batches % 5 == 0)

    def test_the_run_says_once_that_it_does_so_at_epoch_ends_only(self, caplog):
        with caplog.at_level("INFO"):
            fit(*gradual(), data=plain_data())
        assert caplog.text.count("from checkpoints at the end of an epoch") == 1

    def test_resuming_within_an_epoch_is_warned_of(self, tmp_path):
        saver = SaveEverywhere(tmp_path)
        fit(*gradual(), saver, data=plain_data())
        with pytest.warns(UserWarning, match="your dataloader is not resumable"):
            fit(*gradual(), data=plain_data(), ckpt_path=saver.saved[1].path)


def stateful_data() -> dict[str, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader  # late: GPU tests import this file

    data = plain_data()
    return data | {"train_dataloaders": StatefulDataLoader(data["train_dataloaders"].dataset, BATCH, shuffle=True)}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:'set_vital' is deprecated")
def test_with_a_loader_that_says_which_batch_comes_next_each_checkpoint_resumes_bit_identically(tmp_path):
    found = resume_everywhere(tmp_path, gradual, data=stateful_data)
    assert found.keys() <= {"saving"}  # asking this loader for its state draws random numbers


class Reloading(PlainModule):
    """Has other data every second epoch."""

    def train_dataloader(self) -> InMemoryLoader:
        images, labels = samples()
        return InMemoryLoader(images.roll(self.current_epoch, 0), labels, batch_size=BATCH, mean=[128.0], std=[64.0])


def test_loaders_are_made_again_in_the_same_epochs(tmp_path):
    data = {"val_dataloaders": loaders()["val_dataloaders"]}

    def train(*callbacks: L.Callback, ckpt_path: Path | None = None) -> Run:
        settings: dict[str, Any] = {"max_epochs": 6, "reload_dataloaders_every_n_epochs": 2}
        return fit(*gradual(), *callbacks, make=Reloading, data=data, ckpt_path=ckpt_path, **settings)

    saver = SaveEverywhere(tmp_path)
    full = train(saver)
    ends = [saved for saved in saver.saved if saved.moment == "epoch"]
    for saved in ends[:-1]:
        part = train(SaveNowhere(), ckpt_path=saved.path)
        assert not list(resumed_differences(full, part, saved)), saved


def test_a_resumable_loader_is_not_mentioned(caplog):
    with caplog.at_level("INFO"):
        fit(*gradual())
    assert "from checkpoints at the end of an epoch" not in caplog.text


def test_resumed_twice_is_still_bit_identical(tmp_path):
    saver = SaveEverywhere(tmp_path)
    full = fit(*gradual(), saver)
    second = SaveEverywhere(tmp_path / "second")
    fit(*gradual(), second, ckpt_path=saver.saved[4].path)
    for saved in second.saved[3::4]:
        part = fit(*gradual(), SaveEverywhere(tmp_path / "third"), ckpt_path=saved.path)
        assert not list(resumed_differences(full, part, saved))


def test_a_checkpoint_holds_each_random_state_by_rank(tmp_path):
    run = fit(*gradual())
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert [sorted(rank) for rank in states["ExactResume"]["random"]] == [["cuda", "numpy", "python", "torch"]]
