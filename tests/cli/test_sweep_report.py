"""The report on made-up run folders, and on those that a real sweep leaves."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sparsetrain.cli.report import PICTURE, TABLE, find_runs, main, report
from sparsetrain.cli.train import main as train_main

JOB = ("+experiment=tiny", "trainer.max_epochs=2")
WHOLE = {"wall_time_s": 1.0}
GMP = {"_target_": "GMP", "schedule": {"_target_": "Cubic", "initial": 0.0, "final": 0.8}}


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Path]:
    """Make a run's folder as Hydra does when the job begins."""

    def make(folder: str, *overrides: str, seed: int) -> Path:
        hydra = tmp_path / folder / ".hydra"
        hydra.mkdir(parents=True)
        (hydra / "config.yaml").write_text(yaml.dump({"seed": seed}))
        (hydra / "overrides.yaml").write_text(yaml.dump([*JOB, *overrides, f"seed={seed}"]))
        return tmp_path / folder

    return make


@pytest.fixture
def finish(begin: Callable[..., Path]) -> Callable[..., Path]:
    """Make a run's folder with a summary, and the configuration of its method."""

    def make(
        folder: str, *overrides: str, seed: int, accuracy: float = 0.9, method: object = GMP, **facts: object
    ) -> Path:
        path = begin(folder, *overrides, seed=seed)
        (path / "config.yaml").write_text(yaml.dump({"seed": seed, "method": method}))
        stages = {"val": {"accuracy": 0.5}, "test": {"accuracy": accuracy, "loss": 0.125}}
        summary = {"overrides": [*JOB, *overrides, f"seed={seed}"], "seed": seed, "sparsity": 0.8}
        (path / "summary.json").write_text(json.dumps(summary | stages | (facts or WHOLE)))
        return path

    return make


def sweep_file(folder: Path, *overrides: str, sweeper: str = "BasicSweeper") -> None:
    hydra = {
        "overrides": {"task": [*JOB, *overrides]},
        "sweeper": {"_target_": f"hydra.plugins.{sweeper}", "params": None},
    }
    (folder / "multirun.yaml").write_text(yaml.dump({"hydra": hydra, "seed": 1}))


def test_failed_and_unfinished_jobs_are_named_with_the_reason_and_the_rest_is_reported(tmp_path, begin, finish):
    finish("0", "lr=0.1", seed=1, accuracy=0.9)
    finish("1", "lr=0.1", seed=2, accuracy=0.8)
    (begin("2", "lr=0.1", seed=3) / "checkpoints").mkdir()
    (tmp_path / "2" / "checkpoints" / "last.ckpt").touch()
    begin("4", "lr=0.2", seed=1)
    finish("5", "lr=0.2", seed=2, git=None)
    finish("6", "lr=0.2", seed=3, **WHOLE, val={"accuracy": 0.5, "loss": float("nan")})
    (finish("a", "lr=0.3", seed=1) / "summary.json").write_text('{"seed": 1')
    by_code = {"overrides": None, "seed": 2, "sparsity": 0.8} | WHOLE
    (finish("b", "lr=0.3", seed=2) / "summary.json").write_text(json.dumps(by_code))
    sweep_file(tmp_path, "lr=0.1,0.2", "seed=1,2,3,4")

    text = report(tmp_path)
    assert "All with `experiment=tiny trainer.max_epochs=2 lr=0.1`." in text
    assert "| 2 | 80.00% | 85.00% +- 7.07% | 0.125 +- 0 | 50.00% +- 0.00% |" in text
    reasons = dict(line.removeprefix("- ").split(": ", 1) for line in text.splitlines() if line.startswith("- "))
    running = "its training has not ended: it failed, was killed or still runs"
    assert reasons == {
        "2 (seed=3)": f"{running}; ckpt_path={tmp_path}/2/checkpoints/last.ckpt resumes it",
        "3 (seed=4)": "it has not begun",
        "4 (lr=0.2 seed=1)": running,
        "5 (lr=0.2 seed=2)": "it was trained, but its test has not ended: it failed, was killed or still runs",
        "6 (lr=0.2 seed=3)": "it diverged: val/loss is nan",
        "7 (lr=0.2 seed=4)": "it has not begun",
        "a": "its summary.json is damaged, or not of `train`",
        "b": "it was started by Python code, which leaves no overrides to sort it by",
    }
    assert "8 of 10 runs are not in the table" in text
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / TABLE).read_text().splitlines()) == 3
    assert report(tmp_path) == text, "what it wrote must not change what it reads"


def test_a_job_resumed_by_hand_is_the_job_that_the_sweep_began(tmp_path, begin, finish):
    begin("sweep/0", "compile=False", seed=1)
    sweep_file(tmp_path / "sweep", "compile=false", "seed=1,2")
    finish("resumed", "ckpt_path=sweep/0/checkpoints/last.ckpt", "compile=false", seed=1)
    finish("later", "compile=false", seed=2)
    text = report(tmp_path)
    assert "| 2 | 80.00% |" in text
    assert "1 of 3 runs are not in the table" in text
    assert "- sweep/0 (seed=1): resumed is of the same setting and seed, and counts instead" in text


def test_a_sweep_that_went_on_with_resume_true_is_whole(tmp_path, finish):
    for job in range(6):
        on = ["resume=true"] if job in (4, 5) else []
        finish(str(job), "lr=0.1" if job < 3 else "lr=0.2", *on, seed=1 + job % 3)
    sweep_file(tmp_path, "lr=0.1,0.2", "seed=1,2,3", "resume=true")
    text = report(tmp_path)
    assert [line.split(" | ")[:2] for line in text.splitlines() if "80.00%" in line] == [["| 0.1", "3"], ["| 0.2", "3"]]
    assert "resume" not in text
    assert "not in the table" not in text


def test_what_all_runs_were_launched_with_does_not_tell_those_that_are_left_out_apart(tmp_path, begin, finish):
    finish("0", "launcher=joblib", "lr=0.1", seed=1)
    begin("1", "launcher=joblib", "lr=0.1", seed=2)
    assert "- 1 (seed=2): its training has not ended" in report(tmp_path)


@pytest.mark.parametrize(
    ("method", "is_control"),
    [
        (None, True),
        ({"sparsity": 0.0, "per_round": None}, True),
        ({"sparsity": None, "per_round": 0.0}, True),
        ({"schedule": {"sparsity": 0.0, "at": "0it"}}, True),
        ({"schedule": {"initial": 0.0, "final": 0.0, "every": "100it"}}, True),
        ({"n": 2, "m": 4, "sparse_until": "0.5run", "final": "dense"}, False),
        (GMP, False),  # whose network was then made smaller: no mask is left
        ({"schedule": {"initial": 0.5, "final": 0.0}}, False),
        ({"sparsity": 0.5, "measure": "flops"}, False),
        ({"masks": "masks.safetensors"}, False),
    ],
)
def test_a_run_without_zeros_is_the_control_only_if_its_method_aims_at_none(tmp_path, finish, method, is_control):
    for seed in (1, 2):
        finish(f"a{seed}", "arm=a", seed=seed, method=method, **WHOLE, sparsity=0.0)
        finish(f"b{seed}", "arm=b", seed=seed)
    assert ("less dense" in report(tmp_path)) is is_control
    if is_control:
        (tmp_path / "a1" / "config.yaml").unlink()
        assert "less dense" not in report(tmp_path), "its method is not known"


@pytest.mark.parametrize("ended", [True, False])
def test_a_soup_is_one_run_and_those_of_its_ingredients_are_part_of_it(tmp_path, begin, finish, ended):
    finish("one", "method=imp", seed=1)
    soup = tmp_path / "soup"
    for job in ("0/ingredients/0", "1/ingredients/0", "1/ingredients/1"):
        folder = finish(f"soup/rounds/{job}", "method=soup", f"method.only=[{job[0]},{job[-1]}]", seed=1)
        (folder / "rounds" / job).mkdir(parents=True)
    begin("soup/rounds/1/ingredients/2", "method=soup", seed=1)
    sweep_file(soup / "rounds" / "1" / "ingredients", "method=soup", "method.only=[1,3],[1,4]")
    (soup / "config.yaml").write_text(yaml.dump({"seed": 1, "method": {"sparsity": 0.8}}))
    if ended:
        summary = {"overrides": ["method=soup"], "seed": 1, "sparsity": 0.8, "test": {"accuracy": 0.75}} | WHOLE
        (soup / "summary.json").write_text(json.dumps(summary))
    assert [run.folder for run in find_runs(tmp_path)] == ["one", "soup"]
    assert [run.folder for run in find_runs(soup)] == ["."]
    text = report(tmp_path)
    assert ("| soup |" in text) is ended
    assert ("- soup: its training has not ended" in text) is not ended
    within = find_runs(soup / "rounds" / "1" / "ingredients")
    assert {run.folder for run in within} == {"0", "1", "2"}, "they are runs to who asks for them"


def test_folders_named_like_those_of_ingredients_hold_runs_where_there_is_no_soup(tmp_path, finish):
    finish("rounds/1/ingredients/0", seed=1)
    assert [run.folder for run in find_runs(tmp_path)] == ["rounds/1/ingredients/0"]


def test_jobs_are_in_the_order_of_their_numbers(tmp_path, finish):
    for job in (10, 2, 9):
        finish(str(job), f"lr={job}", seed=1)
    assert [run.folder for run in find_runs(tmp_path)] == ["2", "9", "10"]


@pytest.mark.parametrize(
    ("overrides", "sweeper", "planned"),
    [
        (["lr=choice(0.1,0.2)", "seed=range(1,4)"], "BasicSweeper", 6),
        (["lr=0.1", "lr=0.2", "seed=1,2"], "BasicSweeper", 2),
        (["lr=interval(0.1,0.2)", "seed=1,2"], "OptunaSweeper", 0),
        (["lr=0.1,0.2"], "OptunaSweeper", 0),
        (["model=glob(*)", "seed=1,2"], "BasicSweeper", 0),
    ],
)
def test_jobs_that_have_not_begun_are_known_only_where_the_command_lists_them(tmp_path, overrides, sweeper, planned):
    sweep_file(tmp_path, *overrides, sweeper=sweeper)
    assert len(find_runs(tmp_path)) == planned


def test_another_metric_is_compared_and_only_accuracies_are_drawn(tmp_path, finish):
    for seed in (1, 2):
        loss = {"loss": 1.0 + seed}
        finish(f"dense{seed}", "method=dense", seed=seed, method=None, **WHOLE, sparsity=0.0, val=loss)
        finish(f"gmp{seed}", "method=gmp", seed=seed, **WHOLE, val={"loss": 1.5 + seed})
    text = report(tmp_path, "val/loss")
    assert "| val/loss less dense | 95 % interval |" in text
    assert "| 2.5 +- 0.7071 |  |  |" in text
    assert "| 3 +- 0.7071 | +0.5 | [+0.5, +0.5] |" in text
    assert "No picture: it shows accuracies, and val/loss is none." in text
    assert not (tmp_path / PICTURE).exists()


def test_what_cannot_be_reported_is_one_clear_error(tmp_path, begin, finish, monkeypatch):
    def error(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        return str(raised.value)

    assert error() == f"error: There is no run in {tmp_path}. Give a folder below which `train` left summary.json."
    begin("0", seed=1)
    assert error().startswith(f"error: None of the 1 runs in {tmp_path} is whole. Finish one of them.\n- 0 (")
    finish("1", seed=2)
    assert error("--metric", "test/acc") == (
        "error: No run has the metric 'test/acc'. There are: test/accuracy, test/loss, val/accuracy."
    )


def test_a_real_sweep_is_read_as_it_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSETRAIN_STAMP", "now")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    overrides = [
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1",
    ]
    data = [
        "dataset=synthetic",
        "dataset.shape=[1,4,4]",
        "dataset.num_classes=3",
        "dataset.train_size=16",
        "dataset.batch_size=16",
    ]
    choices = ["lr_policy=constant", "seed=1,2"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *overrides, *data, *choices])
    train_main()
    summaries = [json.loads((tmp_path / f"multirun/train/now/{job}/summary.json").read_text()) for job in (0, 1)]
    first, second = (summary["test"]["accuracy"] for summary in summaries)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report", "multirun", "--metric", "test/accuracy"])
    main()
    printed = capsys.readouterr().out
    assert f"| 2 | 0.00% | {(first + second) / 2:.2%} +- {abs(first - second) / 2**0.5:.2%} |" in printed
    assert "not in the table" not in printed
