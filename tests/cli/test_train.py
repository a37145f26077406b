"""What `train` does with a configuration, and what the program does with a command line."""

import csv
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from sparsetrain import models
from sparsetrain.cli.train import main, make_evaluator, make_parts, train
from sparsetrain.cli.weights import load_weights
from sparsetrain.data import Synthetic
from sparsetrain.mask_files import load_masks
from sparsetrain.models import Classifier, LeNet300100

Config = Callable[..., DictConfig]

LEFT_BY_EVERY_RUN = {"checkpoints", "config.yaml", "metrics.csv", "model.safetensors", "summary.json"}
LEFT_BY_A_SPARSE_RUN = LEFT_BY_EVERY_RUN | {"masks.safetensors", "sparsity.csv", "sparsity.png"}
TINY = [
    "+experiment=digits_gmp",
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.max_epochs=2",
    "method.schedule.begin=0it",
    "method.schedule.end=20it",
]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sparse_run_leaves_files_that_agree_with_each_other(
    sparse: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = train(sparse())
    run = tmp_path / "run"
    assert files(run) == LEFT_BY_A_SPARSE_RUN

    summary = json.loads((run / "summary.json").read_text())
    masks = load_masks(run / "masks.safetensors")
    total = 16 * 300 + 300 * 100 + 100 * 3
    assert summary["maskable"] == total
    assert summary["kept"] == sum(int(mask.sum()) for mask in masks.values()) == total - math.floor(0.75 * total + 0.5)
    assert {layer["name"]: layer["kept"] for layer in summary["layers"]} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    assert summary["sparsity"] == 1 - summary["kept"] / total
    assert summary["sparsity_of_all"] == (total - summary["kept"]) / (total + 300 + 100 + 3)
    assert summary["revived"] == 0
    assert returned == summary["val"]["accuracy"]

    network = LeNet300100((1, 4, 4), 3)
    network.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    for name, parameter in network.named_parameters():
        mask = masks.get(f"network.{name}")
        if mask is not None:
            assert not parameter[~mask].any()
    data = Synthetic((1, 4, 4), 3, train_size=64, val_size=24, test_size=24)
    (images, labels), *_ = data.test_dataloader()
    correct = (network(images).argmax(1) == labels).double().mean()
    assert float(correct) == pytest.approx(summary["test"]["accuracy"])

    updates = rows(run / "sparsity.csv")
    assert [int(row["step"]) for row in updates][::3] == [1, 3, 5, 7, 8]
    assert [int(row["kept"]) for row in updates[-3:]] == [int(mask.sum()) for mask in masks.values()]
    printed = capsys.readouterr().out
    assert "75.00%" in printed
    assert str(run) in printed


def test_the_summary_of_an_nm_run_says_which_backend_each_layer_ran_on_and_why(dense):
    cfg = dense("method=bdwp")
    train(cfg)
    backends = json.loads((Path(cfg.output_dir) / "summary.json").read_text())["backends"]
    reason = "2:4 kernels compute in bfloat16 or float16, not in torch.float32"
    empty = {"dense_us": None, "sparse_us": None, "algorithms": None}
    assert backends == [
        {"name": f"network.{name}", "backend": "reference", "reason": reason} | empty for name in ("fc1", "fc2")
    ]


def test_the_summary_says_what_was_run_where_and_for_how_long(sparse: Config, tmp_path: Path) -> None:
    train(sparse("seed=7"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["name"], summary["seed"], summary["steps"], summary["epochs"]) == ("train", 7, 12, 3)
    assert summary["versions"].keys() == {"sparsetrain", "torch", "lightning", "python"}
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"]["type"] == "cpu"
    assert summary["wall_time_s"] > 0
    data = Synthetic((1, 4, 4), 3, train_size=64, val_size=24, test_size=24)
    assert summary["split_hash"] == data.split_hash
    assert summary["command"]
    assert {"git", "resumed_from", "overrides"} <= summary.keys()


def test_the_configuration_is_left_resolved_with_the_facts_of_the_dataset(sparse: Config, tmp_path: Path) -> None:
    train(sparse())
    text = (tmp_path / "run" / "config.yaml").read_text()
    cfg = OmegaConf.create(text)
    assert "${" not in text
    assert cfg.data == {"num_classes": 3, "input_shape": [1, 4, 4], "channels": 1, "image_size": 4}
    assert cfg.module.network == cfg.model


def test_a_run_that_begins_anew_in_a_used_folder_leaves_nothing_of_the_other_one(
    sparse: Config, dense: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(sparse())
    folder = tmp_path / "run"
    (folder / "rounds" / "3").mkdir(parents=True)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparsetrain.cli.train._fit", killed)
        with pytest.raises(KeyboardInterrupt):
            train(dense())
    assert files(folder) <= {"checkpoints", "config.yaml", "metrics.csv"}
    assert not (folder / "checkpoints" / "last.ckpt").exists()


def test_an_optimizer_may_be_chosen_for_a_recipe_and_says_which_settings_it_has_not(dense: Config) -> None:
    assert train(dense("optim=adamw", "trainer.max_epochs=1"))
    with pytest.raises(ValueError, match=r"^The optimizer refuses its settings: .*momentum.*Change optim"):
        train(dense("optim=adamw", "+optim.momentum=0.9"))


def test_a_dense_run_leaves_everything_but_the_sparsity_files(dense: Config, tmp_path: Path) -> None:
    train(dense())
    assert files(tmp_path / "run") == LEFT_BY_EVERY_RUN
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["sparsity"], summary["sparsity_of_all"], summary["layers"]) == (0.0, 0.0, [])


def test_metrics_have_one_row_per_step_and_the_last_validation_is_the_summary(sparse: Config, tmp_path: Path) -> None:
    train(sparse())
    found = rows(tmp_path / "run" / "metrics.csv")
    assert [int(row["step"]) for row in found if row["train/loss"]] == list(range(12))
    assert [float(row["sparsity/actual"]) for row in found if row["sparsity/actual"]][-1] == 0.75
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [float(row["val/accuracy"]) for row in found if row["val/accuracy"]][-1] == summary["val"]["accuracy"]
    assert [float(row["test/accuracy"]) for row in found if row["test/accuracy"]] == [summary["test"]["accuracy"]]


def test_a_checkpoint_loads_safely_and_into_the_plain_model(sparse: Config, tmp_path: Path) -> None:
    train(sparse())
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    network = LeNet300100((1, 4, 4), 3)
    network.load_state_dict({k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()}, strict=True)
    written = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "checkpoints",
    [(), ("callbacks.checkpoint.every_n_epochs=null", "+callbacks.checkpoint.every_n_train_steps=5")],
    ids=["epoch end", "mid-epoch"],
)
@pytest.mark.parametrize("where", ["same folder", "new folder"])
def test_a_killed_and_resumed_run_leaves_what_the_uninterrupted_one_does(
    sparse: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: tuple[str, ...], where: str
) -> None:
    expected = train(sparse(*checkpoints, folder="whole"))

    step = Classifier.training_step

    def killed(self: Classifier, batch: object, batch_idx: int) -> object:
        if self.global_step == 6:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(sparse(*checkpoints, folder="killed"))
    assert "summary.json" not in files(tmp_path / "killed")

    folder = "killed" if where == "same folder" else "resumed"
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert train(sparse(*checkpoints, f"ckpt_path={last}", folder=folder)) == expected

    whole, resumed = tmp_path / "whole", tmp_path / folder
    assert files(resumed) == files(whole)
    for name in ("model.safetensors", "masks.safetensors", "sparsity.csv"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    # The mean over the interrupted epoch's training batches is lost with the process that had seen them.
    averaged = ("train/accuracy", "train/top5") if checkpoints else ()
    strip = [{k: v for k, v in row.items() if k not in averaged} for row in rows(resumed / "metrics.csv")]
    assert strip == [{k: v for k, v in row.items() if k not in averaged} for row in rows(whole / "metrics.csv")]


def test_a_run_killed_after_its_last_step_can_still_be_finished(sparse: Config, tmp_path: Path) -> None:
    expected = train(sparse(folder="whole"))
    last = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    assert train(sparse(f"ckpt_path={last}", folder="finished")) == expected
    assert files(tmp_path / "finished") >= LEFT_BY_A_SPARSE_RUN - {"checkpoints"}
    for name in ("model.safetensors", "masks.safetensors", "sparsity.csv"):
        assert (tmp_path / "finished" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    "length",
    [("trainer.check_val_every_n_epoch=2",), ("trainer.max_epochs=-1", "trainer.max_steps=10")],
    ids=["epochs", "steps"],
)
def test_the_summary_validates_the_network_that_is_left_if_the_last_validation_was_of_an_earlier_one(
    sparse: Config, tmp_path: Path, length: tuple[str, ...]
) -> None:
    every = ("callbacks.checkpoint.every_n_epochs=null", "+callbacks.checkpoint.every_n_train_steps=9")
    settings = (*length, *every, "optimized_metric=val/loss")
    cfg = sparse(*settings, folder="whole")
    returned = train(cfg)
    module, datamodule, _ = make_parts(cfg)
    load_weights(module, tmp_path / "whole" / "model.safetensors")
    evaluator = make_evaluator(cfg, tmp_path, datamodule, soups=False)
    (expected,) = evaluator.validate(module, datamodule=datamodule, verbose=False)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert {f"val/{name}": value for name, value in summary["val"].items()} == expected
    assert returned == expected["val/loss"] == summary["optimized"]["val/loss"]
    masks = (tmp_path / "whole" / "sparsity.csv").read_bytes()

    last = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    assert train(sparse(*settings, f"ckpt_path={last}", folder="resumed")) == returned
    resumed = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    assert [resumed[name] for name in ("val", "test", "optimized")] == [
        summary[name] for name in ("val", "test", "optimized")
    ]
    assert (tmp_path / "resumed" / "sparsity.csv").read_bytes() == masks
    assert rows(tmp_path / "resumed" / "metrics.csv")[-2:] == rows(tmp_path / "whole" / "metrics.csv")[-2:]


def test_a_network_that_was_validated_last_is_not_validated_again(sparse: Config, tmp_path: Path) -> None:
    train(sparse())
    assert len([row for row in rows(tmp_path / "run" / "metrics.csv") if row["val/loss"]]) == 3


def test_masks_that_were_given_stay_in_the_table_when_the_network_is_validated_at_the_end(
    sparse: Config, dense: Config, tmp_path: Path
) -> None:
    train(sparse(folder="first"))
    given = ("method=fixed_masks", f"method.masks={tmp_path}/first/masks.safetensors")
    train(dense(*given, "trainer.check_val_every_n_epoch=2", folder="second"))
    assert {row["step"] for row in rows(tmp_path / "second" / "sparsity.csv")} == {"0"}


class Untested(Classifier):
    test_step = None  # type: ignore[assignment]


def test_a_module_without_a_test_step_is_refused_before_training(
    dense: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "Untested", Untested, raising=False)
    with pytest.raises(ValueError, match="Untested has no test_step, and a run ends with a test"):
        train(dense("module._target_=sparsetrain.models.Untested"))
    assert files(tmp_path / "run") == set()


def test_a_module_keeps_an_example_of_its_own(dense: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(make_parts(dense())[0].example_input_array, torch.zeros(1, 1, 4, 4))
    own = torch.ones(2, 1, 4, 4)
    monkeypatch.setattr(Classifier, "example_input_array", own)
    assert make_parts(dense())[0].example_input_array is own


def test_the_masks_of_one_run_can_be_trained_in_another(sparse: Config, dense: Config, tmp_path: Path) -> None:
    train(sparse(folder="first"))
    masks = tmp_path / "first" / "masks.safetensors"
    train(dense("method=fixed_masks", f"method.masks={masks}", folder="second"))
    assert (tmp_path / "second" / "masks.safetensors").read_bytes() == masks.read_bytes()
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert summary["sparsity"] == 0.75
    assert {row["step"] for row in rows(tmp_path / "second" / "sparsity.csv")} == {"0"}


def test_the_optimized_metric_is_returned(dense: Config, tmp_path: Path) -> None:
    loss = train(dense("optimized_metric=val/loss"))
    assert loss == json.loads((tmp_path / "run" / "summary.json").read_text())["val"]["loss"]


def test_without_an_optimized_metric_no_validation_is_needed(dense: Config, tmp_path: Path) -> None:
    nothing = ("optimized_metric=null", "dataset.val_size=0", "trainer.max_epochs=1")
    assert math.isnan(train(dense(*nothing, folder="first")))
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert math.isnan(train(dense(*nothing, f"ckpt_path={last}", folder="again")))
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["val"] == {}


def test_a_metric_that_needs_validation_is_refused_without_it(dense: Config) -> None:
    with pytest.raises(ValueError, match=r"dataset\.val_size=0 leaves none"):
        train(dense("dataset.val_size=0"))
    with pytest.raises(ValueError, match=r"trainer\.limit_val_batches=0 leaves none"):
        train(dense("+trainer.limit_val_batches=0"))


def test_an_unknown_metric_is_answered_with_those_there_are(dense: Config) -> None:
    with pytest.raises(ValueError, match="val/accuracy"):
        train(dense("optimized_metric=val/acc", "trainer.max_epochs=1"))


def test_a_folder_that_cannot_be_written_is_refused_before_training(sparse: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run's folder .*file/run cannot be written"):
        train(sparse(folder="file/run"))


def test_a_checkpoint_that_is_not_there_is_refused_before_training(sparse: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        train(sparse(f"ckpt_path={tmp_path}/nowhere.ckpt"))


def test_a_dense_checkpoint_does_not_resume_a_sparse_run(sparse: Config, dense: Config, tmp_path: Path) -> None:
    train(dense("trainer.max_epochs=1", folder="dense"))
    with pytest.raises(ValueError, match="without its masks"):
        train(sparse(f"ckpt_path={tmp_path}/dense/checkpoints/last.ckpt"))


@pytest.mark.parametrize(
    ("strategy", "sweeper", "refused"),
    [
        ("ddp", "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", True),
        ("ddp", "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", False),
        ("ddp_spawn", "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", False),
        ("auto", "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", False),
    ],
)
def test_a_sampling_sweeper_is_refused_with_processes_that_would_sample_again(
    dense: Config, monkeypatch: pytest.MonkeyPatch, strategy: str, sweeper: str, refused: bool
) -> None:
    hydra = SimpleNamespace(mode=RunMode.MULTIRUN, sweeper=SimpleNamespace(_target_=sweeper))
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    # A folder that cannot be made ends the accepted runs before they start processes.
    cfg = dense(f"trainer.strategy={strategy}", folder="\0")
    with pytest.raises(ValueError, match=r"ddp_spawn" if refused else "null byte"):
        train(cfg)


@pytest.mark.slow
def test_a_sweep_leaves_one_folder_for_each_job(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "sparsetrain.cli.train"]
    arguments = ["-m", *TINY, "seed=1,2", "method.schedule.final=0.8"]
    done = subprocess.run([*program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun" / "digits_gmp").iterdir()
    assert files(sweep) == {"0", "1", "multirun.yaml"}
    for job, seed in (("0", 1), ("1", 2)):
        assert files(sweep / job) == LEFT_BY_A_SPARSE_RUN | {".hydra"}
        summary = json.loads((sweep / job / "summary.json").read_text())
        assert (summary["seed"], summary["sparsity"]) == (seed, 0.8)
        assert f"seed={seed}" in summary["overrides"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the program with these arguments in an empty folder, in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setenv("SPARSETRAIN_STAMP", "now")
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        main()

    return run


def test_processes_that_share_the_stamp_share_the_run_folder(command: Callable[..., None], tmp_path: Path) -> None:
    command(*TINY, "trainer.fast_dev_run=true")
    run = tmp_path / "runs" / "digits_gmp" / "now"
    assert files(run) >= {".hydra", "config.yaml", "summary.json"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["overrides"] == [*TINY, "trainer.fast_dev_run=true"]


def test_a_run_that_is_told_to_end_has_the_exit_status_of_its_signal(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*_: Any, **__: Any) -> None:
        raise SIGTERMException

    monkeypatch.setattr("sparsetrain.cli.train._fit", told)
    with pytest.raises(SystemExit) as end:
        command(*TINY)
    assert end.value.code == 128 + signal.SIGTERM
    assert "With resume=true it goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=nope"], "Could not find 'experiment/nope'"),
        (["+experiment=digits_gmp", "method.schedule.fnal=0.9"], "Key 'fnal' not in 'Cubic'"),
        (["+experiment=digits_gmp", "method.schedule.final=80"], "Write 0.8 for 80"),
        (["hydra.run.dir=file/run"], "Folders are chosen by hydra.run.dir="),
        (["ckpt_path=nowhere"], "ckpt_path=nowhere does not exist"),
        (["ckpt_path=weights.safetensors"], "holds weights alone, from which no run goes on. Give <run>/checkpoints/"),
        (["ckpt_path=torn.ckpt"], "ckpt_path=torn.ckpt cannot be read as a checkpoint"),
        (["ckpt_path=text.csv"], "ckpt_path=text.csv cannot be read as a checkpoint"),
        (["init_from=torn.ckpt"], "init_from=torn.ckpt cannot be read: "),
        (["init_from=torn.safetensors"], "init_from=torn.safetensors cannot be read: "),
        (["init_from=text.csv"], "init_from=text.csv cannot be read: it is neither safetensors nor what torch"),
        (["optim.lr=abc"], "optim.lr=abc is not a number. Give one, such as optim.lr=1."),
        (["trainer.max_epochs=abc"], "trainer.max_epochs=abc is not a number"),
        (["trainer=cpu", "trainer.devices=abc"], "refuses its settings (accelerator=cpu devices=abc precision=32-true"),
        (["matmul_precision=hihg"], "matmul_precision='hihg' is unknown. Choose one of 'highest', 'high', 'medium'."),
    ],
)
def test_bad_input_is_answered_in_a_few_lines(
    command: Callable[..., None], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "text.csv").write_text("step,train/loss\n1,2\n")
    save_file({"weight": torch.zeros(3000)}, tmp_path / "weights.safetensors")
    torch.save({"global_step": 1, "state_dict": {"weight": torch.zeros(3000)}}, tmp_path / "whole.ckpt")
    for name, whole in (("torn.ckpt", "whole.ckpt"), ("torn.safetensors", "weights.safetensors")):
        (tmp_path / name).write_bytes((tmp_path / whole).read_bytes()[:9000])
    with pytest.raises(SystemExit) as error:
        command(*arguments)
    assert message in str(error.value)
    assert str(error.value).startswith("\nerror: ")


def test_a_gpu_that_is_not_there_is_answered_with_what_runs_without_one(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"refuses its settings \(accelerator=gpu .*trainer=cpu needs no GPU"):
        command("trainer=gpu")


@pytest.mark.slow
def test_a_run_in_spawned_processes_leaves_its_files_too(sparse: Config, tmp_path: Path) -> None:
    train(sparse("trainer.devices=2", "trainer.strategy=ddp_spawn", "method.schedule.end=5it"))
    assert files(tmp_path / "run") == LEFT_BY_A_SPARSE_RUN
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["sparsity"], summary["device"]["processes"]) == (6, 0.75, 2)
    assert summary["kept"] == sum(int(m.sum()) for m in load_masks(tmp_path / "run" / "masks.safetensors").values())


@pytest.mark.slow
def test_a_run_in_spawned_processes_validates_the_network_that_is_left(sparse: Config, tmp_path: Path) -> None:
    place = ("trainer.devices=2", "trainer.strategy=ddp_spawn", "method.schedule.end=5it", "optimized_metric=val/loss")
    every_epoch = train(sparse(*place, folder="every"))
    table = (tmp_path / "every" / "sparsity.csv").read_bytes()
    assert train(sparse(*place, "trainer.check_val_every_n_epoch=2", folder="second")) == every_epoch
    assert (tmp_path / "second" / "sparsity.csv").read_bytes() == table


@pytest.mark.slow
def test_a_run_logs_to_wandb_without_a_network(sparse: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    train(sparse("logger=wandb"))
    assert wandb.run is None, "a run left open would swallow the next job of a sweep"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "run" / "metrics.csv").exists()
