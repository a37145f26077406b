"""Train one network as its configuration says; conf/config.yaml says what can be set."""

import contextlib
import logging
import os
import pickle
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from sparsetrain.callbacks import ExactResume, IterativeMagnitudePruning, SparsityCallback
from sparsetrain.callbacks.recalibration import Recalibration
from sparsetrain.choices import check_choice
from sparsetrain.cli import artifacts, launchers, metrics, resume, rounds, schema, shrunk
from sparsetrain.cli.checkpoints import AtomicCheckpointIO
from sparsetrain.cli.instantiate import instantiate
from sparsetrain.cli.interrupt import CheckpointOnSignal
from sparsetrain.cli.weights import load_weights

schema.register()

BAD_INPUT = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What is wrong with the input, which a program answers with `message`."""
# Of the parts whose schemas have no types.
_NUMBERS = (
    *("optim.lr", "optim.momentum", "optim.weight_decay"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.accumulate_grad_batches"),
)
_PRECISIONS = ("highest", "high", "medium")


def main() -> None:
    """The program: compose the configuration from the command line, and train, once for each job of a sweep."""
    # Processes that a distributed run starts inherit the stamp, and with it the run's folder.
    os.environ.setdefault("SPARSETRAIN_STAMP", datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f"))
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a traceback, and not always the error that matters
    try:
        _main()
    except SIGTERMException:
        print("Stopped by SIGTERM. With resume=true it goes on from its last checkpoint.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except BAD_INPUT as error:
        if wants_traceback:
            raise
        sys.exit(message(error))


def message(error: Exception) -> str:
    """What a program that ends says of an error: its text and those of its causes, and what helps against it."""
    text, cause = str(error).strip(), error.__cause__
    while cause is not None:
        if str(cause) not in text:
            text += f"\n{cause}"
        cause = cause.__cause__
    text += launchers.remedy(text)
    if isinstance(error, OSError) and error.filename is not None:
        text += "\nFolders are chosen by hydra.run.dir=..., hydra.sweep.dir=... (for a sweep) and dataset.root=..."
    return f"\nerror: {text}\n(HYDRA_FULL_ERROR=1 shows where it was raised.)"


@hydra.main(version_base="1.3", config_path="pkg://sparsetrain.conf", config_name="config")
def _main(cfg: DictConfig) -> float:
    launchers.begin_job(cfg)
    return train(cfg)


def compose(*overrides: str, output_dir: str | Path) -> DictConfig:
    """The configuration of one run, for `train`, without a command line.

    Args:
        overrides: as on the command line, such as "+experiment=digits_gmp" and "seed=2".
        output_dir: the run's folder.
    """
    with hydra.initialize_config_module("sparsetrain.conf", version_base="1.3"):
        cfg = hydra.compose("config", list(overrides))
    cfg.output_dir = str(output_dir)
    return cfg


def train(cfg: DictConfig) -> float:
    """Train, test after the last step, and leave the results in the run's folder.

    Args:
        cfg: as conf/config.yaml describes it; its node `data` is filled in.

    Returns:
        The value of `optimized_metric`, for a sweeper to maximise; NaN if that is null.

    Raises:
        ValueError, OSError: settings that do not fit, a folder that cannot be written, a file that is not there; before
            training wherever it can be known then.
    """
    with known_warnings():
        return _train(cfg)


@contextlib.contextmanager
def known_warnings() -> Iterator[None]:
    """Leaves out the warnings of Lightning that tell nothing here."""
    with warnings.catch_warnings():
        # ModelCheckpoint's records begin anew in the folder of a resumed run; in the same folder its file is replaced.
        warnings.filterwarnings("ignore", "The dirpath has changed", UserWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty", UserWarning)
        # With dataset.val_size=0, which is meant.
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero", UserWarning)
        # Lightning 2.6 calls a deprecated name of torch's once for each loader.
        warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec", FutureWarning)
        yield


def _train(cfg: DictConfig) -> float:
    started = time.perf_counter()
    _check_sweep(cfg)
    folder = _writable(Path(cfg.output_dir))
    if cfg.resume and (metrics_of_all := resume.take_up(cfg, folder)) is not None:
        rank_zero_info(f"{folder} holds this run from beginning to end: it is not trained again.")
        return _optimized(cfg.optimized_metric, metrics_of_all)
    earlier = None if cfg.ckpt_path is None else _read_checkpoint(Path(cfg.ckpt_path))

    _check_metric(cfg)
    _check_numbers(cfg)
    module, datamodule, example_input = make_parts(cfg)
    method: SparsityCallback | None = instantiate(cfg.method)
    loggers: list[Logger] = list((instantiate(cfg.logger) or {}).values())
    try:
        trainer = _trainer(
            cfg,
            callbacks=_callbacks(cfg, folder, method, example_input),
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
        )
        if trainer.is_global_zero:
            _begin_logs(cfg, folder, loggers, earlier)
        results = _fit(folder, trainer, module, datamodule, cfg.ckpt_path, earlier)
        results |= dict(next(iter(trainer.test(module, datamodule=datamodule, verbose=False)), {}))
        is_leg = method is not None and cfg.method.get("only") is not None  # its soup is what matters
        if method is not None and shrunk.cuts_off(method) and not is_leg:
            evaluator = make_evaluator(cfg, folder, datamodule, soups=False)
            facts = shrunk.write_and_test(folder, evaluator, module, datamodule, example_input, method)
            if trainer.is_global_zero:
                artifacts.add_to_summary(folder, **facts)
        if isinstance(method, IterativeMagnitudePruning) and not is_leg:
            evaluator = make_evaluator(cfg, folder, datamodule, soups=rounds.makes_soups(method))
            facts = rounds.evaluate(folder, evaluator, module, datamodule, example_input)  # changes the weights
            if trainer.is_global_zero:
                artifacts.add_to_summary(folder, **facts)
        if trainer.is_global_zero:
            seconds = time.perf_counter() - started
            artifacts.add_to_summary(
                folder,
                split_hash=getattr(datamodule, "split_hash", None),
                val=artifacts.of_stage(results, "val"),
                test=artifacts.of_stage(results, "test"),
                optimized={name: value for name, value in results.items() if name == cfg.optimized_metric},
                wall_time_s=round(seconds, 3),
            )
            shown = [f"{name} {value:.4f}" for name, value in results.items() if name.startswith(("val/", "test/"))]
            print(f"{'  '.join(shown)}  ({seconds:.1f} s)\n{folder}")
    finally:
        _close(loggers)
    return _optimized(cfg.optimized_metric, results)


def make_parts(cfg: DictConfig) -> tuple[L.LightningModule, L.LightningDataModule, Tensor]:
    """The module, the data module and a batch of one example, as a run with `cfg` begins with; seeds everything.

    The example is the module's `example_input_array`, too, unless it has one of its own.

    Raises:
        ValueError: settings that do not fit, or a module without a test.
    """
    check_choice(cfg.matmul_precision, "matmul_precision", _PRECISIONS)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    datamodule = instantiate(cfg.dataset)
    _fill_in(cfg.data, datamodule)
    module, example_input = _module(cfg), _example_input(datamodule)
    if not is_overridden("test_step", module):
        raise ValueError(f"{type(module).__name__} has no test_step, and a run ends with a test. Give it one.")
    if module.example_input_array is None:
        module.example_input_array = example_input
    return module, datamodule, example_input


def make_evaluator(
    cfg: DictConfig, folder: Path, datamodule: L.LightningDataModule, *, soups: bool, **settings: Any
) -> L.Trainer:
    """A Trainer like the run's that leaves nothing behind; networks around soups are recalibrated alike.

    Args:
        cfg: of the run.
        folder: the run's.
        datamodule: of the run.
        soups: whether batch norm is recalibrated before each evaluation.
        settings: other arguments of the Trainer.
    """
    quiet = logging.getLogger("lightning.pytorch")
    level = quiet.level
    quiet.setLevel(logging.WARNING)  # it would describe the device again
    try:
        return _trainer(
            cfg,
            callbacks=[Recalibration(datamodule, cfg.seed)] if soups else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            **settings,
        )
    finally:
        quiet.setLevel(level)


def _module(cfg: DictConfig) -> L.LightningModule:
    with contextlib.ExitStack() as stack:
        if cfg.init_seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(cfg.init_seed)
        module: L.LightningModule = instantiate(cfg.module)
    if cfg.init_from is not None:
        load_weights(module, Path(cfg.init_from))
    return module


def _trainer(cfg: DictConfig, **settings: Any) -> L.Trainer:
    try:
        trainer: L.Trainer = instantiate(cfg.trainer, _partial_=True)(**settings)
    except (MisconfigurationException, TypeError) as error:
        own = " ".join(f"{name}={cfg.trainer.get(name)}" for name in ("accelerator", "devices", "precision"))
        raise ValueError(
            f"lightning.Trainer refuses its settings ({own}, ...): {error} Change trainer.* accordingly; trainer=cpu "
            "needs no GPU."
        ) from error
    return trainer


def _fit(
    folder: Path,
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    ckpt_path: str | None,
    earlier: Mapping[str, Any] | None,
) -> dict[str, float]:
    """Train, validate what that has left, and return the last value of every logged metric."""
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    if earlier is not None and trainer.global_step == earlier["global_step"]:
        # The run was killed after its last step: Lightning has restored it and found nothing left to train.
        steps = trainer.global_step
        rank_zero_info(f"{ckpt_path} holds all {steps} steps of the run; only its results are made again.")
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # From the file, as with `ddp_spawn` this process has not trained.
    is_validated = trainer.strategy.broadcast(trainer.is_global_zero and "val" in artifacts.read_summary(folder))
    has_loader = any(is_overridden("val_dataloader", of) for of in (datamodule, module))
    if not is_validated and has_loader and is_overridden("validation_step", module):
        results |= dict(next(iter(trainer.validate(module, datamodule=datamodule, verbose=False)), {}))
    return results


def _callbacks(
    cfg: DictConfig, folder: Path, method: SparsityCallback | None, example_input: Tensor
) -> list[L.Callback]:
    facts = {
        "name": cfg.name,
        "command": shlex.join(sys.argv),
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None,
        "resumed_from": cfg.ckpt_path,
        "seed": cfg.seed,
    }
    own = [artifacts.Artifacts(folder, method, example_input, facts), ExactResume()]
    if isinstance(method, IterativeMagnitudePruning):
        own += rounds.callbacks(folder, method)
    others = [callback for callback in (instantiate(cfg.callbacks) or {}).values() if callback is not None]
    if cfg.trainer.get("enable_checkpointing", True):
        others.append(CheckpointOnSignal(folder / resume.CHECKPOINT))
    return [*([] if method is None else [method]), *own, *others]


def _begin_logs(cfg: DictConfig, folder: Path, loggers: list[Logger], earlier: Mapping[str, Any] | None) -> None:
    """Write the resolved configuration to the folder and the loggers; go on with what a resumed run has written."""
    if earlier is None:
        _forget_other_run(folder)
    resume.write_config(cfg, folder)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]  # cfg is a dict
        if earlier is not None and isinstance(logger, metrics.MetricsCSV):
            logger.take_over(Path(cfg.ckpt_path).parent.parent / metrics.FILE, earlier["global_step"])
    if earlier is not None:
        done = Path(cfg.ckpt_path).absolute().parent.parent / rounds.FOLDER
        if done.is_dir() and done.parent != folder:
            shutil.copytree(done, folder / rounds.FOLDER, dirs_exist_ok=True)


def _forget_other_run(folder: Path) -> None:
    """Remove what a run that begins anew in this folder would pass off as its own: the results first."""
    files = (artifacts.SUMMARY, resume.CHECKPOINT, artifacts.MODEL, artifacts.MASKS, artifacts.SPARSITY)
    pictures = (artifacts.PICTURE, artifacts.GATES, rounds.PICTURE, rounds.SOUPS_PICTURE)
    for name in (*files, *pictures, rounds.TABLE, rounds.SOUPS, rounds.TICKET):
        (folder / name).unlink(missing_ok=True)
    for name in (rounds.FOLDER, shrunk.FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _close(loggers: list[Logger]) -> None:
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()  # else the next job of a sweep would go on in this one's run


def _check_sweep(cfg: DictConfig) -> None:
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    strategy, sweeper = str(cfg.trainer.get("strategy")), HydraConfig.get().sweeper._target_
    if launchers.runs_again(strategy) and not sweeper.endswith(".BasicSweeper"):
        raise ValueError(
            f"trainer.strategy={strategy} starts processes that run the whole sweep again, and {sweeper} would sample "
            "other jobs there. Use trainer.strategy=ddp_spawn, or a launcher that gives each job its own processes."
        )


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.absolute()
    except OSError as error:
        raise OSError(
            f"The run's folder {folder} cannot be written: {error.strerror}. Choose another by hydra.run.dir=..., or "
            "for a sweep by hydra.sweep.dir=..."
        ) from None


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt_path={path} does not exist. The last checkpoint of a run is <its folder>/checkpoints/last.ckpt."
        )
    try:
        checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"ckpt_path={path} cannot be read as a checkpoint: it is damaged or something else. Give another one, or "
            "remove it to begin anew."
        ) from error
    if "global_step" not in checkpoint:
        raise ValueError(
            f"ckpt_path={path} holds weights alone, from which no run goes on. Give <run>/checkpoints/last.ckpt, or "
            "begin with the weights by init_from=..."
        )
    return checkpoint


def _fill_in(data: DictConfig, datamodule: Any) -> None:
    """The facts about the dataset that models ask for."""
    data.num_classes, data.input_shape = datamodule.num_classes, list(datamodule.input_shape)
    if len(datamodule.input_shape) == 3:
        data.channels, height, width = datamodule.input_shape
        data.image_size = height if height == width else None


def _example_input(datamodule: Any) -> Tensor:
    """A batch of one example, of zeros."""
    return torch.zeros(1, *datamodule.input_shape, dtype=datamodule.input_dtype)


def _check_metric(cfg: DictConfig) -> None:
    sizes = {
        "dataset.val_size": cfg.dataset.get("val_size"),
        "trainer.limit_val_batches": cfg.trainer.get("limit_val_batches"),
    }
    for name, size in sizes.items():
        if size == 0 and str(cfg.optimized_metric).startswith("val/"):
            raise ValueError(
                f"optimized_metric={cfg.optimized_metric} is measured on validation data, but {name}=0 leaves none. "
                "Give it some, or set optimized_metric=null."
            )


def _check_numbers(cfg: DictConfig) -> None:
    for name in _NUMBERS:
        value = OmegaConf.select(cfg, name)
        if isinstance(value, str):
            raise ValueError(f"{name}={value} is not a number. Give one, such as {name}=1.")


def _optimized(name: str | None, results: Mapping[str, float]) -> float:
    if name is None:
        return float("nan")
    if name not in results:
        raise ValueError(f"optimized_metric={name} was not logged; there are {sorted(results)}. The run is complete.")
    return results[name]


if __name__ == "__main__":
    main()
