"""experiments/kernel_speed/kernel_speed.py on a CPU: every part runs, and only results of a GPU are reported."""

import ast
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "kernel_speed"


@pytest.fixture
def kernel_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("kernel_speed")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a CPU")
def test_every_part_runs_on_a_cpu_through_the_reference(kernel_speed: ModuleType, tmp_path: Path) -> None:
    tiny = kernel_speed.Scale(
        products=((32, 12, 16), (32, 7, 48)),
        dtypes=("bfloat16",),
        weights=((32, 48),),
        mlp=((16, 12),),
        vit=kernel_speed.Transformer(1, "vit_tiny_patch16_224", (("img_size", 32), ("depth", 1), ("num_classes", 10))),
        gpt=kernel_speed.Transformer(2, width=16, depth=1, heads=2, vocabulary=32, length=8),
        rounds=2,
        step_rounds=1,
        calls=20,
    )
    path, parts = tmp_path / "out.json", list(kernel_speed.PARTS)
    kernel_speed.run(path, parts, scale=tiny, quick=True, budget_s=300.0, commit="abc")
    results = json.loads(path.read_text())
    path.unlink()
    assert results["failures"] == results["left_out"] == []
    assert (results["device"]["type"], results["quick"], results["commit"]) == ("cpu", True, "abc")
    assert results["versions"]["torch"] == torch.__version__
    rows = results["rows"]
    assert {part: len(rows[part]) for part in kernel_speed.PARTS} == {
        **{"products": 2, "packing": 1, "host": 1, "memory": 3, "mlp": 1, "vit": 1, "gpt": 1},
        "algorithms": 0,  # there are none on a CPU
    }
    variants = {
        "products": {"dense", "dense_compiled", "masked", "sparse"},
        "packing": {"prune", "compress", "copy"},
        "host": {"dense", "sparse", "compress"},
        "mlp": {"dense", "dense_compiled", "dense_bfloat16", "masked", "sparse"},
        "vit": {"dense", "dense_compiled", "bdwp", "bdwp_compiled"},
        "gpt": {"dense", "dense_compiled", "bdwp", "bdwp_compiled"},
    }
    for part, names in variants.items():
        for row in rows[part]:
            assert set(row["us"]) == names
            assert all(us["median_us"] > 0 for us in row["us"].values())
    assert all(0 < row["error"][name] < 1e-2 for row in rows["products"] for name in ("dense", "sparse"))
    assert [row["call"] for row in rows["memory"]] == ["dense", "sparse", "compress"]
    assert all(len(row["samples"]) == 11 for row in rows["memory"])
    for part in ("vit", "gpt"):
        assert (rows[part][0]["layers"], rows[part][0]["sparse_layers"]) == (4, 0)
        assert "torch sees no CUDA device" in rows[part][0]["decisions"][0]
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"cpu.json is of a quick run; only whole runs on a GPU are results"):
        kernel_speed.load_results(tmp_path)
    (tmp_path / "cpu.json").write_text(json.dumps({**results, "quick": False}))
    with pytest.raises(ValueError, match=r"cpu.json is of a cpu; only whole runs on a GPU are results"):
        kernel_speed.load_results(tmp_path)


def us(**medians: float) -> dict[str, dict[str, float]]:
    return {name: {"median_us": median} for name, median in medians.items()}


def test_tables_show_ratios_to_the_fastest_dense_the_bars_and_what_is_missing(kernel_speed: ModuleType) -> None:
    product = {"rows": 4096, "tokens": 16384, "k": 1024, "dtype": "bfloat16", "error": {"dense": 2e-3, "sparse": 3e-3}}
    step = {"name": "a ViT", "batch": 128, "layers": 96, "sparse_layers": 90}
    results = {
        "device": {"type": "cuda", "name": "GPU A", "driver": "1.2"},
        "versions": {"torch": "2.11.0", "cuSPARSELt": "0.8.0"},
        "date": "2026-01-01",
        "commit": None,
        "rows": {
            "products": [
                {**product, "us": us(dense=200.0, dense_compiled=180.0, masked=300.0, sparse=150.0)},
                {**product, "tokens": 8, "us": us(dense=2.0, dense_compiled=2.0, masked=3.0, sparse=1.0)},
            ],
            "algorithms": [{**product, "algorithm": 7, "us": us(dense=200.0, sparse=150.0, searched=100.0)}],
            "mlp": [
                {
                    **{"width": 4096, "tokens": 16384},
                    "us": us(dense=12e3, dense_compiled=11e3, dense_bfloat16=11.5e3, masked=13e3, sparse=10e3),
                }
            ],
            "vit": [{**step, "us": us(dense=600e3, dense_compiled=500e3, bdwp=550e3, bdwp_compiled=400e3)}],
        },
        "failures": [{"part": "gpt", "row": 0, "error": "OutOfMemoryError: no"}],
        "left_out": ["memory 2"],
    }
    text = kernel_speed.tables(results)
    assert "**cuSPARSELt 0.8.0** is what torch 2.11 brings" in text
    assert "| 200 | 180 | 300 | 150 | 100 | 1.20 | 2.00 | 7 | 916 |" in text
    assert "| 2 | 2 | 3 | 1 |  | 2.00 |  |  |" in text
    assert "| 12.00 | 11.00 | 11.50 | 13.00 | 10.00 | 1.200 | 1.100 | >= 1.08 |" in text
    assert "| 128 | 600.0 | 500.0 | 550.0 | 400.0 | 90 of 96 | 1.250 | >= 1.03 |" in text
    assert "Not measured, for time: memory 2." in text
    assert "Failed: gpt 0: OutOfMemoryError: no" in text
    newer = {**results, "versions": {"torch": "2.13.0", "cuSPARSELt": "0.8.1"}}
    assert "what torch 2.11 brings" not in kernel_speed.tables(newer)
    assert kernel_speed.tables() == "Not measured: `results/` holds none of a GPU."


def test_time_that_is_up_and_a_row_that_fails_leave_the_other_rows_in_the_file(
    kernel_speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "out.json"

    def rows(names: str) -> Any:
        def part(bench: Any) -> Any:
            for name in names:
                yield lambda name=name: {"name": name, "inverse": 1 / (name != "z")}
                if name == "e":
                    bench.deadline = time.monotonic() - 1

        return part

    def run(*parts: str, **options: Any) -> dict[str, list[str]]:
        settings = {"scale": kernel_speed.QUICK, "quick": True, "budget_s": 60.0, "commit": None, **options}
        found = kernel_speed.run(path, parts, **settings)
        assert json.loads(path.read_text()) == found
        return {part: [row["name"] for row in rows] for part, rows in found["rows"].items()}

    monkeypatch.setattr(kernel_speed, "PARTS", {"first": rows("azb"), "late": rows("def"), "third": rows("g")})
    assert run("first") == {"first": ["a", "b"]}
    assert json.loads(path.read_text())["failures"] == [
        {"part": "first", "row": 1, "error": "ZeroDivisionError: division by zero"}
    ]
    assert run("late", "third") == {"first": ["a", "b"], "late": ["d", "e"], "third": []}
    left = json.loads(path.read_text())
    assert (len(left["failures"]), left["left_out"]) == (1, ["late 2", "third 0"])
    assert run("third") == {"first": ["a", "b"], "late": ["d", "e"], "third": ["g"]}
    assert json.loads(path.read_text())["left_out"] == ["late 2"]
    with pytest.raises(SystemExit, match="is of another device, other versions or another scale"):
        run("third", quick=False)
    with pytest.raises(SystemExit, match="name a file by --out"):
        kernel_speed.run(None, ["third"], scale=kernel_speed.QUICK, quick=True, budget_s=1.0, commit=None)


def test_it_needs_no_package_that_a_machine_with_a_gpu_may_lack() -> None:
    application = ROOT / "sparsetrain" / "cli"
    # `test_layers` sees to the rest of the package.
    for file in (*FOLDER.glob("*.py"), application / "__init__.py", application / "artifacts.py"):
        names = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names.append(str(node.module))
        assert not {name.partition(".")[0] for name in names} & {"hydra", "omegaconf", "wandb", "torchdata"}
        assert file.parent == FOLDER or not any(name.startswith("sparsetrain.cli") for name in names)


# Finds no package whose name is given as an argument, before all else.
_WITHOUT = """
import importlib.machinery, sys
whole, missing = importlib.machinery.PathFinder.find_spec, set(sys.argv[1:])
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *others: None if name.partition(".")[0] in missing else whole(name, *others)
)
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:hydra_pytest", "-p", "no:cacheprovider", "tests"]))
"""


@pytest.mark.slow
def test_neither_do_the_tests_that_need_a_gpu() -> None:
    missing = ["hydra", "omegaconf", "wandb", "torchdata", "sklearn", "torch_pruning", "onnxruntime", "nbclient"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *missing], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/ops/test_layers_gpu.py::" in done.stdout


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_quick_run_on_a_gpu_has_no_failure(kernel_speed: ModuleType, tmp_path: Path) -> None:
    options = {"scale": kernel_speed.QUICK, "quick": True, "budget_s": 500.0, "commit": None}
    results = kernel_speed.run(tmp_path / "out.json", list(kernel_speed.PARTS), **options)
    assert results["failures"] == results["left_out"] == []
