"""What the README says is what the code does."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import TinyModule, loaders, make_trainer
from omegaconf import OmegaConf

from sparsetrain import GradualMagnitudePruning, IterativeMagnitudePruning, SparseModelSoup, SparsityCallback
from sparsetrain.cli.train import compose
from sparsetrain.export import load_shrunk
from sparsetrain.report import cost

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
README = (ROOT / "README.md").read_text()
# None before a GPU was at hand; then one for each GPU and version of cuSPARSELt.
KERNEL_RESULTS = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.glob("kernel_speed/results/*.json"))
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_block(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a block that trains, on a module that it has never seen; returns its names."""

    class QuietTrainer(L.Trainer):
        def __init__(self, **settings: object) -> None:
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            super().__init__(**settings, accelerator="cpu", default_root_dir=folder, limit_val_batches=0, **quiet)

    monkeypatch.setattr(L, "Trainer", QuietTrainer)
    names = {"module": TinyModule(), "loader": loaders()["train_dataloaders"], "example_input": torch.ones(2, 1, 4, 4)}
    exec(block, names)
    for name, mask in names["pruning"].masks.items():
        assert not (names["module"].get_parameter(name)[~mask] != 0).any()
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # the blocks have no validation loader
@pytest.mark.parametrize(
    ("block", "method", "sparsity"),
    # The first one's run has 5 steps an epoch here, so "every 50 steps" leaves its first and its last update.
    [
        (BLOCKS[0], GradualMagnitudePruning, 0.9),
        (BLOCKS[1], IterativeMagnitudePruning, 0.8),
        (BLOCKS[2], SparseModelSoup, 0.9),
    ],
)
def test_the_blocks_that_train_prune_a_module_they_have_never_seen(tmp_path, monkeypatch, block, method, sparsity):
    pruning = run_block(block, tmp_path, monkeypatch)["pruning"]
    assert isinstance(pruning, method)
    total = pruning.masks.total
    assert sum(pruning.masks.kept.values()) == total - int(sparsity * total + 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:.* of the gates are undecided")  # the run has 200 steps
def test_the_block_that_makes_a_network_smaller_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_block(BLOCKS[3], tmp_path, monkeypatch)
    example = names["example_input"]
    assert sum(cost(names["small"], example).values()) <= 0.5 * sum(cost(names["module"], example).values())
    loaded = load_shrunk(TinyModule(), tmp_path / "small").eval()
    torch.testing.assert_close(loaded(example), names["module"](example))


def test_the_method_written_in_the_readme_alternates_and_ends_sparse() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[4], names)
    method = names["AlternatingCompression"](0.75, "1ep", warmup="1ep", finish="14it")
    assert isinstance(method, SparsityCallback)
    make_trainer(method).fit(TinyModule(), **loaders())
    assert [(update.step, update.target) for update in method.history] == [(5, 0.75), (10, 0.0), (14, 0.75)]
    assert method.final_step() == 14
    assert sum(method.masks.kept.values()) == method.masks.total // 4


def test_every_experiment_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"\+experiment=(\w+)", README))
    assert named
    assert all((ROOT / "sparsetrain" / "conf" / "experiment" / f"{name}.yaml").exists() for name in named)


@pytest.mark.parametrize(
    ("name", "tables", "results", "readme"),
    [
        ("overhead", "summary_table", ["overhead/results/overhead.json"], "../README.md"),
        ("overhead", "detail_tables", ["overhead/results/overhead.json"], "overhead/README.md"),
        ("overhead/checkpoints", "table", ["overhead/results/checkpoints.json"], "overhead/README.md"),
        ("overhead/nm", "table", ["overhead/results/nm.json"], "overhead/README.md"),
        ("digits_lottery", "tables", ["digits_lottery/results/digits_lottery.json"], "digits_lottery/README.md"),
        ("digits_lottery", "bars_table", ["digits_lottery/results/digits_lottery.json"], "../README.md"),
        ("kernel_speed/kernel_tables", "tables", KERNEL_RESULTS, "kernel_speed/README.md"),
        ("kills", "table", ["kills/results/kills.json"], "kills/README.md"),
        ("kills", "table", ["kills/results/rounds.json"], "kills/README.md"),
        ("kills", "table", ["kills/results/soup.json"], "kills/README.md"),
        ("soup/accuracy", "rounds_table", ["soup/results/digits.json"], "soup/README.md"),
        ("soup/accuracy", "rounds_table", ["soup/results/resnet20.json"], "soup/README.md"),
        ("polarization/speed", "table", ["polarization/results/speed.json"], "polarization/README.md"),
        ("polarization/speed", "summary_table", ["polarization/results/speed.json"], "../README.md"),
        ("polarization/gates_cost", "table", ["polarization/results/gates_cost.json"], "polarization/README.md"),
        ("soup/averaging", "table", ["soup/results/averaging.json"], "soup/README.md"),
        ("sweep", "table", ["sweep/results/sweep.json"], "sweep/README.md"),
        ("peers/equal_masks", "tables", ["peers/results/equal_masks.json"], "peers/README.md"),
        ("throughput", "table", ["throughput/results/cpu.json"], "throughput/README.md"),
        ("peers", "tables", ["peers/results/peers.json", "overhead/results/overhead.json"], "peers/README.md"),
    ],
)
def test_the_tables_are_those_of_the_results_files(
    name: str, tables: str, results: list[str], readme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, module = name.rpartition("/")
    monkeypatch.syspath_prepend(EXPERIMENTS)  # evidence
    monkeypatch.syspath_prepend(EXPERIMENTS / (folder or name))
    experiment = importlib.import_module(module)
    contents = [json.loads((EXPERIMENTS / file).read_text()) for file in results]
    assert getattr(experiment, tables)(*contents) in (EXPERIMENTS / readme).read_text()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """experiments/run.py."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("run")


def test_the_tables_of_studies_are_those_of_their_results(run) -> None:
    for study in run.STUDIES.values():
        if study.control in study.networks(study.results):
            assert study.table(study.results) in (study.folder / "README.md").read_text()
    for marker, body in run.headlines().items():
        assert f"<!-- {marker}:begin -->\n{body}\n" in README
    for marker, body in (("claims", run.index()), ("costs", run.pareto.table(run.costs()))):
        assert f"<!-- {marker}:begin -->\n{body}\n" in (EXPERIMENTS / "README.md").read_text()


def test_each_arm_of_each_study_composes_and_is_made_once(run, tmp_path) -> None:
    for study in run.STUDIES.values():
        seeds = {arm: study.seeds_of.get(arm, study.seeds) for arm in study.arms}
        assert sorted(study.jobs) == sorted((arm, seed) for arm in study.arms for seed in seeds[arm])
        configs = {}
        for arm in study.arms:
            overrides, folder = study.grid.job(arm, 1)
            cfg = compose(*overrides, output_dir=tmp_path)
            configs[folder] = OmegaConf.to_yaml(cfg)
        assert len(set(configs.values())) == len(configs) == len(study.arms)  # no two arms are the same


def test_each_study_has_a_place_in_its_readme(run) -> None:
    for study in run.STUDIES.values():
        lines = (study.folder / "README.md").read_text().splitlines()
        assert lines.count(f"<!-- {study.key}:begin -->") == lines.count(f"<!-- {study.key}:end -->") == 1, study.name


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "make test" in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")


def test_each_study_with_results_shows_a_picture(run) -> None:
    for study in run.STUDIES.values():
        if any(arm != study.control for arm in study.networks(study.results)):
            assert f"]({study.key}.png)" in (study.folder / "README.md").read_text(), study.name
            assert (study.folder / f"{study.key}.png").is_file(), study.name
