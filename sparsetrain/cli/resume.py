"""`resume=true`: a run goes on by itself from where its folder says that it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsetrain.cli.artifacts import CONFIG, SUMMARY, write_whole

CHECKPOINT = Path("checkpoints", "last.ckpt")
# What a run may be resumed with otherwise: its place, and what is not trained.
_MAY_DIFFER = frozenset({"name", "ckpt_path", "resume", "optimized_metric", "output_dir", "logger"})


def take_up(cfg: DictConfig, folder: Path) -> dict[str, float] | None:
    """Set `cfg.ckpt_path` to the last checkpoint in the run's folder, if there is one.

    Args:
        cfg: of the run.
        folder: its own, which may hold nothing yet.

    Returns:
        If the run is complete, the validation, test and optimized metrics that it ended with, by name; else None.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """
    metrics, checkpoint = _final_metrics(folder), folder / CHECKPOINT
    if metrics is not None or checkpoint.is_file():
        check_same(cfg, folder)
    if metrics is None and checkpoint.is_file():
        cfg.ckpt_path = str(checkpoint)
    return metrics


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a run that has trained and tested to its end."""
    return _final_metrics(folder) is not None


def check_same(cfg: DictConfig, folder: Path) -> None:
    """Compare the configuration of a run with that in its folder.

    In a sweep that is repeated with other values, job 0 would else take up, or pass for, another run.

    Raises:
        ValueError: they differ in what is trained.
    """
    earlier = OmegaConf.load(folder / CONFIG)
    asked = OmegaConf.merge(cfg, {"data": earlier.data})  # the facts that cfg lacks until the dataset is made
    there, here = _values(earlier), _values(OmegaConf.create(OmegaConf.to_yaml(asked, resolve=True)))
    different = [name for name in there.keys() | here.keys() if there.get(name) != here.get(name)]
    if different:
        name = min(different, key=lambda name: (name.count("."), name))  # `seed` rather than what refers to it
        more = f" (and {len(different) - 1} more)" if different[1:] else ""
        earlier_one, this_one = (f"{name}={each[name]}" if name in each else f"no {name}" for each in (there, here))
        remedy = "Give the run its own settings, or another folder."
        if name not in there:
            remedy += f" If it was made before this entry was, add it to {folder / CONFIG}, as it then was."
        raise ValueError(f"{folder} holds a run with {earlier_one}, which cannot go on with {this_one}{more}. {remedy}")


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write config.yaml, resolved; an older one is replaced as a whole."""
    write_whole(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))


def _final_metrics(folder: Path) -> dict[str, float] | None:
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (FileNotFoundError, ValueError):  # ValueError: a power failure has emptied it
        return None
    if "wall_time_s" not in summary:
        return None  # training has ended, and the test has not
    of_stages = {f"{stage}/{name}": value for stage in ("val", "test") for name, value in summary[stage].items()}
    return {**of_stages, **summary["optimized"]}


def _values(cfg: Any) -> dict[str, Any]:
    """Each entry that decides what is trained, by its dotted name."""
    values: dict[str, Any] = {}

    def add(node: Any, name: str) -> None:
        if isinstance(node, Mapping):
            for key, below in node.items():
                add(below, f"{name}.{key}" if name else str(key))
        else:
            values[name] = node

    container = OmegaConf.to_container(cfg)
    assert isinstance(container, dict)
    (container.get("callbacks") or {}).pop("checkpoint", None)  # when it saves, and where
    add({key: node for key, node in container.items() if key not in _MAY_DIFFER}, "")
    return values
