import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsetrain.cli import artifacts
from sparsetrain.cli.artifacts import Artifacts, add_to_summary, git_state, write_model
from sparsetrain.cli.train import train


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class Around(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def test_a_network_is_written_under_its_own_names_without_the_module_around_it(tmp_path: Path) -> None:
    module = Around(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    write_model(tmp_path, module)
    nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=True
    )


def test_a_module_without_a_network_is_written_whole(tmp_path: Path) -> None:
    write_model(tmp_path, nn.Linear(2, 3))
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}


def test_tied_and_strided_weights_load_strictly(tmp_path: Path) -> None:
    module = Tied()
    with torch.no_grad():
        module.embedding.weight.set_(torch.rand(3, 5).T)
    write_model(tmp_path, module)
    other = Tied()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other.head.weight, module.embedding.weight)


def test_a_summary_is_added_to_and_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"seed": 1, "val": {}}')
    add_to_summary(tmp_path, val={"accuracy": 0.5}, test={"accuracy": 0.25})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"seed": 1, "val": {"accuracy": 0.5}, "test": {"accuracy": 0.25}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


class Clocked(L.LightningModule):
    """A step takes 7 seconds in the first epoch and 2 later, and 100 in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.now = nn.Linear(1, 1), 0.0

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.now += 2 if self.current_epoch else 7
        return self(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.now += 100

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Batches(L.LightningDataModule):
    batch_size = 6

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(5 * 6, 1), batch_size=6)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(1, 1))


@pytest.mark.parametrize("every", [2, 5])
def test_examples_are_counted_over_the_last_epoch_without_validation(tmp_path, monkeypatch, every):
    module = Clocked()
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(perf_counter=lambda: module.now))
    trainer = L.Trainer(
        max_epochs=3,
        val_check_interval=every,
        callbacks=[Artifacts(tmp_path, None, torch.zeros(1, 1), {})],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Batches())
    assert json.loads((tmp_path / "summary.json").read_text())["examples_per_s"] == 6 / 2


def test_a_count_that_fails_costs_neither_the_weights_nor_the_masks(sparse, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("cannot be counted")

    monkeypatch.setattr(artifacts, "measure", fail)
    with pytest.raises(RuntimeError, match="cannot be counted"):
        train(sparse())
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"model.safetensors", "masks.safetensors", "sparsity.csv"}


CUT = ("allocation=uniform", "pattern=channel", "method.pruning.where.exclude=[network.fc1.weight]")
CUT += ("callbacks.checkpoint.every_n_epochs=null",)


@pytest.mark.parametrize("at", [10, 12])
def test_training_flops_are_of_the_whole_network_until_it_shrinks_in_a_resumed_run_too(sparse, tmp_path, at):
    def flops(*overrides: str, saved: int) -> tuple[int, int]:
        shrink = f"+callbacks.shrink={{_target_:sparsetrain.Shrinking,at:{at}it}}"
        every = f"+callbacks.checkpoint.every_n_train_steps={saved}"
        train(sparse(*CUT, shrink, every, *overrides, folder=str(saved)))
        summary = json.loads((tmp_path / str(saved) / "summary.json").read_text())
        return summary["training_flops"], summary["dense_flops"]

    whole = 2 * (16 * 300 + 300 * 100 + 100 * 3)
    for saved in (9, 10, 11):  # before, at and after the cut; then 12 more from there, as far as the run is long
        found, small = flops(saved=saved)
        assert small < whole / 5
        assert found == 3 * 16 * (whole * at + small * (12 - at))
        assert flops(f"ckpt_path={tmp_path}/{saved}/checkpoints/last.ckpt", saved=saved)[0] == found


def test_git_state_says_the_commit_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None

    def git(*arguments: str) -> str:
        name = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        done = subprocess.run(["git", *name, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    assert git_state() == {"commit": None, "dirty": False}
    (tmp_path / "file").write_text("")
    git("add", "file")
    git("commit", "-m", "first")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("changed")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_git_state_is_none_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state() is None
