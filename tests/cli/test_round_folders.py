import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from sparsetrain import Ticket, load_masks
from sparsetrain.cli.train import train
from sparsetrain.report import overlap

IMP = (
    "method=imp",
    "method.rounds=2",
    "method.round_length=2ep",
    "method.sparsity=0.75",
    "method.weights=rewind",
    "method.rewind_to=1ep",
    "trainer.max_epochs=-1",
)
WEIGHTS = 16 * 300 + 300 * 100 + 100 * 3

Compose = Callable[..., DictConfig]


@pytest.fixture
def found(dense: Compose, tmp_path: Path) -> Path:
    train(dense(*IMP))
    return tmp_path / "run"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "rounds.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_round_leaves_its_masks_and_its_network(found: Path) -> None:
    masks = [load_masks(found / "rounds" / str(number) / "masks.safetensors") for number in range(3)]
    for number, sparsity in enumerate((0.0, 0.5, 0.75)):
        kept = sum(int(mask.sum()) for mask in masks[number].values())
        assert kept == WEIGHTS - int(sparsity * WEIGHTS + 0.5)
        network = load_file(found / "rounds" / str(number) / "model.safetensors")
        for name, mask in masks[number].items():
            assert not network[name.removeprefix("network.")][~mask].any()
    last = load_file(found / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in network.items())


def test_the_table_counts_steps_epochs_and_examples_and_evaluates_each_network(found: Path) -> None:
    table = rows(found)
    assert [(row["first_step"], row["steps"], row["epochs_seen"], row["examples"]) for row in table] == [
        ("0", "8", "2.0", "128"),
        ("8", "4", "3.0", "64"),
        ("12", "4", "4.0", "64"),
    ]
    masks = [load_masks(found / "rounds" / str(number) / "masks.safetensors") for number in range(3)]
    assert float(table[2]["overlap"]) == overlap(masks[1], masks[2]) == 0.5
    summary = json.loads((found / "summary.json").read_text())
    assert summary["test"]["accuracy"] == summary["rounds"][2]["test/accuracy"] == float(table[2]["test/accuracy"])
    assert summary["val"]["loss"] == pytest.approx(float(table[2]["val/loss"]))
    assert len({row["val/loss"] for row in table}) == 3
    assert (found / "accuracy.png").stat().st_size > 10_000


def test_evaluating_the_rounds_logs_nothing(found: Path) -> None:
    with (found / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["test/accuracy"]]
    assert steps == [16]


def test_a_resumed_run_has_the_rounds_of_its_first_part(dense: Compose, found: Path, tmp_path: Path) -> None:
    every = ("callbacks.checkpoint.every_n_epochs=null", "+callbacks.checkpoint.every_n_train_steps=10")
    train(dense(*IMP, *every, folder="first"))
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"  # of step 10, within round 1
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 10
    for later in ("1", "2"):
        for path in (tmp_path / "first" / "rounds" / later).iterdir():
            path.unlink()
    train(dense(*IMP, *every, f"ckpt_path={checkpoint}", folder="resumed"))
    assert (tmp_path / "resumed" / "rounds.csv").read_text() == (found / "rounds.csv").read_text()


def test_the_ticket_is_trained_by_itself_and_as_its_controls(dense: Compose, found: Path, tmp_path: Path) -> None:
    ticket = Ticket.load(found / "ticket.safetensors")
    assert ticket.masks.keys() == load_masks(found / "masks.safetensors").keys()
    for control, seed in (("none", "null"), ("random_mask", "null"), ("reinit", "7"), ("random_mask_reinit", "7")):
        lottery = ("method=lottery", "method.rounds=0", "method.round_length=2ep", "method.rewind_to=1ep")
        given = (f"method.ticket={found}/ticket.safetensors", f"method.control={control}", "method.sparsity=null")
        train(dense(*lottery, *given, f"init_seed={seed}", "trainer.max_epochs=-1", folder=control))
        masks = load_masks(tmp_path / control / "masks.safetensors")
        for name, mask in ticket.masks.items():
            assert mask.sum() == masks[name].sum()
            assert torch.equal(mask, masks[name]) == ("random" not in control)
        assert [row["steps"] for row in rows(tmp_path / control)] == ["4"]


def test_another_seed_of_the_weights_leaves_the_data_alone(dense: Compose, tmp_path: Path) -> None:
    runs = {}
    for name, override in (("same", "init_seed=null"), ("other", "init_seed=5"), ("again", "init_seed=5")):
        train(dense("trainer.max_epochs=1", override, folder=name))
        runs[name] = load_file(tmp_path / name / "model.safetensors")["fc1.weight"]
    assert torch.equal(runs["other"], runs["again"])
    assert not torch.equal(runs["other"], runs["same"])


def test_a_run_begins_from_given_weights(dense: Compose, tmp_path: Path) -> None:
    train(dense("trainer.max_epochs=1", folder="first"))
    first = load_file(tmp_path / "first" / "model.safetensors")
    torch.save(first, tmp_path / "state.pt")
    still = ("optim.lr=0.0", "trainer.max_epochs=1")
    for name in ("first/model.safetensors", "state.pt", "first/checkpoints/last.ckpt"):
        train(dense(*still, f"init_from={tmp_path}/{name}", "seed=9", folder="second"))
        second = load_file(tmp_path / "second" / "model.safetensors")
        assert all(torch.equal(first[key], tensor) for key, tensor in second.items())


def test_rounds_go_on_from_given_weights_without_a_dense_phase(dense: Compose, found: Path, tmp_path: Path) -> None:
    given = ("method.dense_length=0it", f"init_from={found}/rounds/0/model.safetensors", "method.weights=keep")
    train(dense(*IMP, *given, folder="pretrained"))
    assert [row["first_step"] for row in rows(tmp_path / "pretrained")] == ["0", "4"]


def test_weights_of_another_network_are_refused(dense: Compose, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"init_from=nowhere does not exist"):
        train(dense("init_from=nowhere"))
    save_file({"fc1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds the weights of another network(?s:.*)size mismatch"):
        train(dense(f"init_from={tmp_path}/other.safetensors"))
