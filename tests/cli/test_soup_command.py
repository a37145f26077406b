"""Soups from the command line: what one run leaves, and the same soup from runs of its ingredients."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_shrunk import assert_smaller_is_the_same
from conftest import DENSE
from hydra.errors import HydraException
from safetensors.torch import load_file

from sparsetrain import load_masks
from sparsetrain.cli import soup as command
from sparsetrain.cli.train import compose, train

SOUP = (
    *DENSE,
    *("model=resnet20", "model.width=2", "method=soup", "method.rounds=2", "method.round_length=1ep"),
    *("method.ingredients=2", "method.sparsity=0.75", "trainer.max_epochs=-1"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run with all ingredients."""
    folder = tmp_path_factory.mktemp("whole")
    train(compose(*SOUP, output_dir=folder))
    return folder


class InProcess:
    """Stands for the multirun of a phase: trains its jobs here, one after the other; some die.

    Attributes:
        dying: (round, ingredient) -> how often it dies, at its end.
        trained: the jobs, in order.
    """

    def __init__(self) -> None:
        self.dying: dict[tuple[int, int], int] = {}
        self.trained: list[tuple[int, int]] = []

    def __call__(self, arguments: Sequence[str], **_: Any) -> None:
        assert "-m" in arguments
        overrides = [one for one in arguments[4:] if not one.startswith(("hydra.", "method.only="))]
        (jobs,) = [one.removeprefix("method.only=") for one in arguments if one.startswith("method.only=")]
        (place,) = [one for one in arguments if one.startswith("hydra.sweep.dir=")]
        for number, ingredient in json.loads(f"[{jobs}]"):
            folder = Path(place.partition("=")[2].strip("'")) / str(ingredient)
            self.trained.append((number, ingredient))
            train(compose(*overrides, f"method.only=[{number},{ingredient}]", output_dir=folder))
            if self.dying.get((number, ingredient), 0):
                self.dying[number, ingredient] -= 1
                (folder / "summary.json").unlink()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    runner = InProcess()
    monkeypatch.setattr(command, "_run", runner)
    return runner


@pytest.mark.slow
def test_a_soup_that_is_told_to_end_ends_its_training(tmp_path: Path) -> None:
    child = "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)"
    parent = f"import sys; from sparsetrain.cli.soup import _run; _run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert children
    assert not any(Path(f"/proc/{number}").exists() for number in children)


def same_rounds(one: Path, other: Path) -> None:
    for made in sorted((one / "rounds").iterdir()):
        folders = [made, other / "rounds" / made.name]
        masks = [load_masks(folder / "masks.safetensors") for folder in folders]
        states = [load_file(folder / "model.safetensors") for folder in folders]
        for first, second in (masks, states):
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first), made


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def test_one_run_leaves_each_ingredient_and_compares_it_with_the_soup(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    found = rows(whole, "soups.csv")
    assert [(row["round"], row["network"]) for row in found] == [
        (number, network) for number in ("1", "2") for network in ("soup", "0", "1")
    ]
    assert [r["test/accuracy"] for r in summary["rounds"][1:]] == [
        float(row["test/accuracy"]) for row in found if row["network"] == "soup"
    ]
    for number, of_round in zip(("1", "2"), summary["soups"], strict=True):
        members = [load_file(whole / "rounds" / number / "ingredients" / j / "model.safetensors") for j in ("0", "1")]
        mean = (members[0]["fc.weight"].double() + members[1]["fc.weight"]) / 2
        soup = load_file(whole / "rounds" / number / "model.safetensors")
        torch.testing.assert_close(soup["fc.weight"].double(), mean, rtol=0, atol=1e-6)
        squares = ((members[0][n] - members[1][n]).double() ** 2 for n in members[0] if "running" not in n)
        assert of_round["distance"] == pytest.approx(float(sum(map(torch.sum, squares))) ** 0.5)
        assert len(of_round["ingredients"]) == 2
    assert summary["rounds"][2]["test/loss"] == pytest.approx(summary["test"]["loss"], rel=1e-4)  # recalibrated alike
    assert (whole / "soups.png").stat().st_size > 10_000
    table = rows(whole, "rounds.csv")
    assert [(row["first_step"], row["steps"], row["examples"]) for row in table] == [
        ("0", "4", "64"),
        ("4", "8", "128"),
        ("12", "8", "128"),
    ]


def test_ingredients_in_runs_of_their_own_make_the_soup_of_the_one_run_bit_for_bit(
    whole: Path, jobs: InProcess, tmp_path: Path
) -> None:
    command.soup(tmp_path / "soup", SOUP)
    assert jobs.trained == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    same_rounds(whole, tmp_path / "soup")
    for name in ("rounds.csv", "soups.csv"):
        for one, other in zip(rows(whole, name), rows(tmp_path / "soup", name), strict=True):
            assert one == other
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, tmp_path / "soup")]
    assert summaries[0]["soups"] == summaries[1]["soups"]


def test_the_folder_of_a_soup_is_that_of_a_run_but_for_what_is_logged_while_it_trains(
    whole: Path, jobs: InProcess, tmp_path: Path
) -> None:
    command.soup(tmp_path, SOUP)
    logged = {"metrics.csv", "sparsity.csv", "sparsity.png", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()} - logged
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "rounds" / "2" / name).read_bytes(), name
    one, soup = (json.loads((folder / "summary.json").read_text()) for folder in (whole, tmp_path))
    assert one.keys() == soup.keys()
    own = {"command", "overrides", "examples_per_s", "wall_time_s", "val", "test", "optimized", "git"}
    assert {name: soup[name] for name in soup.keys() - own} == {name: one[name] for name in one.keys() - own}
    for name in ("val", "test", "optimized"):
        assert soup[name] == pytest.approx(one[name], rel=1e-4), name  # batch norm is recalibrated before
    assert soup["wall_time_s"] > 0


def test_a_soup_without_whole_channels_leaves_the_smaller_network_too(jobs: InProcess, tmp_path: Path) -> None:
    lenet = tuple(one for one in SOUP if not one.startswith("model"))
    channels = ("pattern=channel", "allocation=uniform", "method.pruning.where.exclude=[network.fc1.weight]")
    command.soup(tmp_path, (*lenet, *channels, "method.rounds=1"))
    assert_smaller_is_the_same(tmp_path)


def test_what_is_finished_is_not_made_again_and_what_died_is_tried_again(
    whole: Path, jobs: InProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "soup"
    jobs.dying = {(1, 1): 3}
    with pytest.raises(RuntimeError, match=r"Round 1 lacks 1 of 2 ingredients, tried 2 times: .*ingredients/1"):
        command.soup(folder, SOUP)
    assert jobs.trained == [(0, 0), (1, 0), (1, 1), (1, 1)]
    jobs.trained.clear()
    command.soup(folder, SOUP)
    assert jobs.trained == [(1, 1), (1, 1), (2, 0), (2, 1)]
    same_rounds(whole, folder)
    with pytest.raises(ValueError, match=r"holds a run with method.sparsity=0.75, which cannot go on with .*=0.5"):
        command.soup(folder, (*SOUP, "method.sparsity=0.5"))
    jobs.trained.clear()
    shutil.rmtree(folder / "rounds" / "2")
    command.soup(folder, SOUP)
    assert jobs.trained == [(2, 0), (2, 1)]
    same_rounds(whole, folder)


def test_without_the_dead_the_soup_is_of_those_left_only_if_asked_for(
    jobs: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.dying = {(1, 0): 9}
    command.soup(tmp_path, (*SOUP, "method.rounds=1"), retries=0, without_dead=True)
    assert "Round 1 goes on without [" in capsys.readouterr().out
    left = load_file(tmp_path / "rounds" / "1" / "ingredients" / "1" / "model.safetensors")
    soup = load_file(tmp_path / "rounds" / "1" / "model.safetensors")
    assert all(torch.equal(soup[name], left[name]) for name in soup if "running" not in name)
    jobs.dying = {(1, 0): 9, (1, 1): 9}
    with pytest.raises(RuntimeError, match="Round 1 lacks 2 of 2"):
        command.soup(tmp_path / "none", (*SOUP, "method.rounds=1"), retries=0, without_dead=True)


@pytest.mark.parametrize("method", ["method=imp", "method.only=[1,0]"])
def test_another_method_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"makes no soup, or one leg of one\. Use method=soup"):
        command.soup(tmp_path, (*DENSE, "method=soup", method))


def test_a_checkpoint_that_is_not_of_the_end_is_refused(jobs: InProcess, tmp_path: Path) -> None:
    every = ("callbacks.checkpoint.every_n_epochs=null", "+callbacks.checkpoint.every_n_train_steps=3")
    with pytest.raises(ValueError, match=r"is of step 3, and the run has 4\. Let callbacks.checkpoint save"):
        command.soup(tmp_path, (*SOUP, *every))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_trains_the_ingredients_from_the_command_line(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = (*SOUP, "method.rounds=1", "method.dense_length=0it")  # a single phase
    train(compose(*one, output_dir=tmp_path / "whole"))
    monkeypatch.setattr("sys.argv", ["sparsetrain-soup", str(tmp_path / "soup"), *one, f"launcher={launcher}"])
    command.main()
    same_rounds(tmp_path / "whole", tmp_path / "soup")


def test_what_is_wrong_with_the_input_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["sparsetrain-soup", str(tmp_path), *DENSE])
    with pytest.raises(SystemExit, match=r"^\nerror: method=NoneType makes no soup"):
        command.main()
    wrong = [*SOUP, "method.ingredients=abc"]
    monkeypatch.setattr("sys.argv", ["sparsetrain-soup", str(tmp_path), *wrong])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit, match=r"^\nerror: Error merging override method\.ingredients=abc\nValue 'abc' "):
        command.main()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(HydraException, match=r"method\.ingredients=abc"):
        command.main()
