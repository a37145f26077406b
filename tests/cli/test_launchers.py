"""Sweeps of several jobs at a time, and runs that go on by themselves."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hydra
import lightning as L
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from sparsetrain.cli import launchers
from sparsetrain.cli.interrupt import CheckpointOnSignal
from sparsetrain.cli.train import compose, main, train
from sparsetrain.models import Classifier

RUN = (
    *("method=gmp", "method.schedule.final=0.75", "method.schedule.begin=1it", "method.schedule.end=8it"),
    *("dataset=synthetic", "dataset.shape=[1,4,4]", "dataset.num_classes=3", "dataset.train_size=64"),
    *("dataset.val_size=24", "dataset.test_size=24", "dataset.batch_size=16", "trainer=cpu"),
    *("trainer.enable_progress_bar=false", "trainer.max_epochs=3", "trainer.log_every_n_steps=1"),
)
WRITTEN = ("model.safetensors", "masks.safetensors", "sparsity.csv")


class Stop(L.Callback):
    """Sends this process a signal within the backward pass of the sixth batch (of four an epoch), once in a folder."""

    def __init__(self, number: int = signal.SIGUSR2) -> None:
        self.number = number

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mark = Path(trainer.default_root_dir) / "stopped"
        assert isinstance(trainer.callbacks[-1], CheckpointOnSignal), "it would save others before their own last hook"
        if trainer.global_step == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), self.number)


# No other checkpoint: what a stopped run goes on from is the one that the signal made it write.
STOPPED = ("callbacks.checkpoint.every_n_epochs=100", "resume=true", "+callbacks.stop._target_=test_launchers.Stop")


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in WRITTEN)


def resumed_from(folder: Path) -> str | None:
    found: str | None = json.loads((folder / "summary.json").read_text())["resumed_from"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, with seed 1."""
    folder = tmp_path_factory.mktemp("whole")
    train(compose(*RUN, output_dir=folder))
    return folder


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run a sweep of these arguments in an empty folder; gives its folder."""

    def run(*arguments: str) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setenv("SPARSETRAIN_STAMP", "now")
        monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
        main()
        return tmp_path / "multirun" / "train" / "now"

    return run


@pytest.mark.slow
def test_jobs_side_by_side_leave_what_they_leave_one_by_one(
    command: Callable[..., Path], tmp_path: Path, whole: Path
) -> None:
    sweep = command(*RUN, "launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2")
    train(compose(*RUN, "seed=2", output_dir=tmp_path / "1"))
    for job, alone in (("0", whole), ("1", tmp_path / "1")):
        assert same_files(sweep / job, alone)
        assert json.loads((sweep / job / "summary.json").read_text())["device"]["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_a_submitted_job_that_is_stopped_within_a_batch_is_queued_again_and_ends_exactly(
    command: Callable[..., Path], whole: Path
) -> None:
    job = command(*RUN, *STOPPED, "launcher=submitit_local") / "0"
    assert same_files(job, whole)
    assert resumed_from(job) == str(job / "checkpoints" / "last.ckpt")
    (log,) = job.parent.glob(".submitit/*/*_0_log.out")
    assert "Requeued job" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_stopped_within_a_batch_goes_on_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, number: int
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    stopped = compose(*RUN, *STOPPED, f"+callbacks.stop.number={int(number)}", output_dir=tmp_path / "run")

    def leave(*_: object) -> None:
        raise SystemExit

    before = signal.getsignal(number)
    if number == signal.SIGUSR1:
        signal.signal(number, leave)  # as submitit would; SIGTERM is Lightning's
    try:
        with pytest.raises(SystemExit):
            train(stopped.copy())
        assert signal.getsignal(number) is (leave if number == signal.SIGUSR1 else before)
    finally:
        signal.signal(number, before)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert train(stopped.copy()) == json.loads((whole / "summary.json").read_text())["val"]["accuracy"]
    assert resumed_from(tmp_path / "run") == str(last)
    assert same_files(tmp_path / "run", whole)


def test_a_signal_while_the_run_validates_takes_effect_at_once_and_one_after_the_last_batch_too(tmp_path: Path) -> None:
    received: list[int] = []
    trainer = SimpleNamespace(training=False, world_size=1, received_sigterm=False)
    before = signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
    try:
        callback = CheckpointOnSignal(tmp_path / "last.ckpt")
        callback.on_train_start(trainer, L.LightningModule())  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGUSR2)
        assert received == [signal.SIGUSR2]
        trainer.training = True
        signal.raise_signal(signal.SIGUSR2)
        assert len(received) == 1
        callback.on_train_end(trainer, L.LightningModule())  # type: ignore[arg-type]
        assert len(received) == 2
        signal.raise_signal(signal.SIGUSR2)
        assert len(received) == 3
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a training step is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("trained")

    return lambda: monkeypatch.setattr(Classifier, "training_step", refuse)


@pytest.mark.parametrize("metric", ["val/accuracy", "train/loss"])
def test_a_complete_run_is_not_trained_again_and_returns_the_same(
    tmp_path: Path, no_training: Callable[[], None], metric: str
) -> None:
    cfg = compose(*RUN, "resume=true", f"optimized_metric={metric}", output_dir=tmp_path)
    first = train(cfg.copy())
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    no_training()
    assert train(cfg.copy()) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written


def test_a_run_whose_summary_is_not_whole_goes_on_from_its_checkpoint(
    tmp_path: Path, no_training: Callable[[], None]
) -> None:
    cfg = compose(*RUN, "resume=true", output_dir=tmp_path)
    first = train(cfg.copy())
    summary = tmp_path / "summary.json"
    whole = json.loads(summary.read_text())
    no_training()  # the checkpoint holds all steps
    untested = {name: value for name, value in whole.items() if name != "wall_time_s"}
    for left in (json.dumps(whole)[:40], json.dumps(untested)):
        summary.write_text(left)
        (tmp_path / "checkpoints" / ".last.ckpt.tmp").write_text("half")
        assert train(cfg.copy()) == first
        assert json.loads(summary.read_text()).keys() == whole.keys()


def test_a_folder_that_holds_another_run_is_refused_and_named(tmp_path: Path) -> None:
    train(compose(*RUN, "resume=true", output_dir=tmp_path))
    with pytest.raises(ValueError, match=r"seed=1, which cannot go on with seed=2 \(and 1 more\)"):
        train(compose(*RUN, "resume=true", "seed=2", output_dir=tmp_path))
    (tmp_path / "summary.json").unlink()  # it had not ended
    with pytest.raises(ValueError, match=r"method\.schedule\.final=0\.75, .*=0\.5"):
        train(compose(*RUN, "resume=true", "method.schedule.final=0.5", output_dir=tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "momentum" not in line))
    with pytest.raises(ValueError, match=r"with no optim\.momentum, .* with optim\.momentum=.*config\.yaml"):
        train(compose(*RUN, "resume=true", output_dir=tmp_path))


@pytest.mark.parametrize(
    ("visible", "job", "device"),
    [
        (None, 0, "0"),
        (None, 5, "2"),
        ("4,GPU-a1,7", 1, "GPU-a1"),
        ("4,GPU-a1,7", 3, "4"),
        ("2", 3, "2"),  # of a worker that has had a job before
        ("", 3, ""),
    ],
)
def test_a_job_has_the_device_of_its_number(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, job: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launchers.assign_device(job)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device


def test_without_a_device_none_is_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launchers.assign_device(3)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


TARGETS = {
    "basic": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "joblib": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
}


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From its call on, this process is job 1 of a launcher, on a machine of two devices."""

    def begin(launcher: str) -> None:
        hydra = SimpleNamespace(
            mode=RunMode.MULTIRUN,
            launcher=SimpleNamespace(_target_=TARGETS[launcher]),
            job=SimpleNamespace(num=1),
        )
        monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    return begin


@pytest.mark.parametrize("launcher", TARGETS)
def test_only_a_job_of_joblib_for_one_device_is_given_one(job_of: Callable[[str], None], launcher: str) -> None:
    for devices, given in ((1, "1" if launcher == "joblib" else "0,1"), (2, "0,1"), ("auto", "0,1")):
        job_of(launcher)
        launchers.begin_job(OmegaConf.create({"trainer": {"devices": devices}}))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == given


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true", "ddp_spawn", "auto"])
@pytest.mark.parametrize("launcher", TARGETS)
def test_processes_that_would_run_the_sweep_again_are_refused(
    job_of: Callable[[str], None], launcher: str, strategy: str
) -> None:
    job_of(launcher)
    cfg = OmegaConf.create({"trainer": {"devices": 2, "strategy": strategy}})
    if strategy in ("ddp_spawn", "auto") or launcher in ("basic", "submitit_slurm"):
        launchers.begin_job(cfg)
    else:
        with pytest.raises(ValueError, match=r"Use trainer\.strategy=ddp_spawn"):
            launchers.begin_job(cfg)


@pytest.mark.parametrize(
    ("launcher", "extra"), [("joblib", "joblib"), ("submitit_local", "submitit"), ("submitit_slurm", "submitit")]
)
def test_a_launcher_that_is_not_installed_is_answered_with_its_remedy(
    command: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, launcher: str, extra: str
) -> None:
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{launcher}.yaml")
    with pytest.raises(SystemExit) as error:
        command(f"launcher={launcher}")
    assert f"Could not find 'hydra/launcher/{launcher}'" in str(error.value)
    assert f"pip install 'sparsetrain[{extra}]'" in str(error.value)


@pytest.mark.parametrize("launcher", TARGETS)
def test_a_launcher_is_chosen_by_its_name_and_requeued_jobs_go_on(launcher: str) -> None:
    with hydra.initialize_config_module("sparsetrain.conf", version_base="1.3"):
        cfg = hydra.compose("config", [f"launcher={launcher}", "+experiment=digits_gmp"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_ == TARGETS[launcher]
    assert cfg.resume is launcher.startswith("submitit")
