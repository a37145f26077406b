"""Two processes make the same masks, notice when they do not, and resume exactly. One pair of them does it all."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import TinyModule, loaders, make_trainer, seed_all
from conformance.methods import METHODS, Method, every_method
from lightning.pytorch.callbacks import ModelCheckpoint

from sparsetrain import SparsityCallback

pytestmark = pytest.mark.slow


class OwnDropout(L.Callback):
    """Lets each rank draw other numbers, as on several machines."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.manual_seed(100 + trainer.global_rank)


class DisturbOneRank(L.Callback):
    """Writes to the weights of one rank alone."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            pl_module.head.weight.data.normal_()


def train(method: Method, *callbacks: L.Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    """What this rank has at the end of a fit."""
    seed_all(3 if ckpt_path is None else 99)
    callback: SparsityCallback = method.make()
    draws = [OwnDropout()] if ckpt_path is None else []
    trainer = make_trainer(*draws, callback, *callbacks, strategy="ddp", devices=2)
    module = TinyModule()
    trainer.fit(module, **loaders(), ckpt_path=ckpt_path)
    return {
        "masks": dict(callback.masks),
        "weights": {name: parameter.detach() for name, parameter in module.named_parameters()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "random": torch.get_rng_state(),
    }


def work(rank: int, folder: Path) -> None:
    """All that one of the two processes does; Lightning finds it started by somebody else."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": (folder / "port").read_text(),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
    }
    done: dict[str, Any] = {method.name: train(method) for method in METHODS}
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    done["full"] = train(METHODS[0], keep)
    done["resumed"] = train(METHODS[0], ckpt_path=folder / "step=8.ckpt")
    try:
        train(METHODS[0], DisturbOneRank())
    except RuntimeError as error:
        done["error"] = str(error)
    torch.save(done, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder with the checkpoints, and what each rank did."""
    folder = tmp_path_factory.mktemp("ddp")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (folder / "port").write_text(str(store.port))
    del store  # its port is free again
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


@every_method
def test_masks_and_weights_are_equal_on_both_ranks(method: Method, ranks: Any) -> None:
    first, second = (rank[method.name] for rank in ranks[1])
    assert not equal(first["random"], second["random"])
    assert equal(first["masks"], second["masks"])
    assert equal(first["weights"], second["weights"])
    total = sum(mask.numel() for mask in first["masks"].values())
    kept = sum(int(mask.sum()) for mask in first["masks"].values())
    assert kept == total - int(method.sparsity * total + 0.5)


def test_masks_that_differ_between_ranks_are_an_error_on_both(ranks: Any) -> None:
    for rank in ranks[1]:
        assert rank["error"].startswith("The ranks made different masks at step")


def test_a_run_on_two_ranks_resumes_bit_identically_on_each(ranks: Any) -> None:
    for rank in ranks[1]:
        assert equal(rank["full"], rank["resumed"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the one that saved is not needed
def test_a_checkpoint_of_two_processes_is_refused_by_one(ranks: Any) -> None:
    with pytest.raises(ValueError, match="run on 2 processes and cannot be resumed exactly on 1"):
        make_trainer(METHODS[0].make()).fit(TinyModule(), **loaders(), ckpt_path=ranks[0] / "step=4.ckpt")
