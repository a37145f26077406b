"""How the whole suite is run, and the run of twelve steps that tests of the application share.

That run: LeNet-300-100 on 64 made-up images of 4x4 pixels, pruned to 75 % between steps 1 and 8.
"""

import importlib.util
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from omegaconf import DictConfig

# A machine with a GPU may have what `import sparsetrain` needs, timm and torchvision: `pytest -m gpu tests` runs there.
collect_ignore = [] if importlib.util.find_spec("hydra") else ["cli", "test_configs.py", "test_readme.py"]

QUIET = ("trainer=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")
DENSE = (
    *QUIET,
    "dataset=synthetic",
    "dataset.shape=[1,4,4]",
    "dataset.num_classes=3",
    "dataset.train_size=64",
    "dataset.val_size=24",
    "dataset.test_size=24",
    "dataset.batch_size=16",
    "trainer.max_epochs=3",
    "lr_policy.warmup=2it",
)
SPARSE = (
    "method=gmp",
    "method.schedule.final=0.75",
    "method.schedule.begin=1it",
    "method.schedule.end=8it",
    "method.schedule.every=2it",
    *DENSE,
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Count no coverage in slow tests and in those of conformance/, of which there are many of the same lines.

    Tracing would take them half as long again.
    """
    if item.get_closest_marker("slow") is None and item.path.parent.name != "conformance":
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture
def dense(tmp_path: Path) -> "Callable[..., DictConfig]":
    """Further overrides -> the dense run's configuration, in a folder called "run" or as given."""
    from sparsetrain.cli.train import compose

    return lambda *overrides, folder="run": compose(*DENSE, *overrides, output_dir=tmp_path / folder)


@pytest.fixture
def sparse(tmp_path: Path) -> "Callable[..., DictConfig]":
    """Further overrides -> the sparse run's configuration, in a folder called "run" or as given."""
    from sparsetrain.cli.train import compose

    return lambda *overrides, folder="run": compose(*SPARSE, *overrides, output_dir=tmp_path / folder)
