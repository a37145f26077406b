"""What the README says is what the code does."""

import json
import re
from pathlib import Path

import lightning as L
import pytest
from conformance.harness import TinyModule, loaders, make_trainer

from sparsetrain import GradualMagnitudePruning, SparsityCallback

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # the block has no validation loader
def test_the_first_block_prunes_a_module_it_has_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class QuietTrainer(L.Trainer):
        def __init__(self, **settings: object) -> None:
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            super().__init__(**settings, accelerator="cpu", default_root_dir=tmp_path, limit_val_batches=0, **quiet)

    monkeypatch.setattr(L, "Trainer", QuietTrainer)
    names = {"module": TinyModule(), "loader": loaders()["train_dataloaders"]}
    # The block's run has 5 steps an epoch here, so "every 50 steps" leaves its first and its last update.
    exec(BLOCKS[0], names)
    pruning = names["pruning"]
    assert isinstance(pruning, GradualMagnitudePruning)
    total = pruning.masks.total
    assert sum(pruning.masks.kept.values()) == total - int(0.9 * total + 0.5)
    for name, mask in pruning.masks.items():
        assert not (names["module"].get_parameter(name)[~mask] != 0).any()


def test_the_method_written_in_the_readme_alternates_and_ends_sparse() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[1], names)
    method = names["AlternatingCompression"](0.75, "1ep", warmup="1ep", finish="14it")  # type: ignore[operator]
    assert isinstance(method, SparsityCallback)
    make_trainer(method).fit(TinyModule(), **loaders())
    assert [(update.step, update.target) for update in method.history] == [(5, 0.75), (10, 0.0), (14, 0.75)]
    assert method.final_step() == 14
    assert sum(method.masks.kept.values()) == method.masks.total // 4


def test_every_experiment_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"\+experiment=(\w+)", README))
    assert named
    assert all((ROOT / "sparsetrain" / "conf" / "experiment" / f"{name}.yaml").exists() for name in named)


def test_the_table_of_costs_is_that_of_the_results_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "overhead")
    import overhead

    results = json.loads(overhead.RESULTS.read_text())
    assert overhead.summary_table(results) in README


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "make test" in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
