"""What a job of a sweep needs to know of the launcher that runs it."""

import multiprocessing
import os
import re

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig


def begin_job(cfg: DictConfig) -> None:
    """Prepare a job's process, of joblib's the device too; to be called before CUDA is used.

    Raises:
        ValueError: a strategy whose processes the launcher would start wrongly.
    """
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    launcher = HydraConfig.get().launcher._target_.rpartition(".")[2]
    strategy = str(cfg.trainer.get("strategy"))
    if launcher in ("JoblibLauncher", "LocalLauncher") and runs_again(strategy):
        raise ValueError(
            f"trainer.strategy={strategy} starts processes by the command line, which under {launcher} is not the "
            "job's: they would run the sweep again. Use trainer.strategy=ddp_spawn, or launcher=submitit_slurm."
        )
    if launcher == "JoblibLauncher":
        multiprocessing.set_start_method(None, force=True)  # joblib's own is unknown to processes that a job starts
        if cfg.trainer.get("devices") == 1:
            assign_device(HydraConfig.get().job.num)


def runs_again(strategy: str) -> bool:
    """Whether a strategy of Lightning's starts processes that run the command line again."""
    return strategy.startswith("ddp") and not any(part in strategy for part in ("spawn", "fork", "notebook"))


def assign_device(job: int) -> None:
    """Leave this process one CUDA device of those that it may use: the one of the job's number, modulo their count.

    CUDA reads the choice once, so a worker that takes another job later stays on the device of its first one.

    Args:
        job: number of the job, from 0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[job % len(devices)]


def remedy(message: str) -> str:
    """What to install, if Hydra's `message` is that it misses a launcher; else nothing."""
    missing = re.search(r"hydra/launcher/(joblib|submitit)", message)
    return f"\nInstall the launcher: pip install 'sparsetrain[{missing[1]}]'" if missing else ""
