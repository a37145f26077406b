"""The wheel: its metadata, its files, and its program run from an empty folder without the repository."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sparsetrain.conf

ROOT = Path(__file__).parents[1]
CONF = Path(sparsetrain.conf.__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel's contents, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = _copy(folder / "source")  # a build leaves folders beside the sources
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


def _copy(target: Path) -> Path:
    target.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "train.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    for name in ("sparsetrain", "tests", "experiments"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def requirements(wheel: Path) -> dict[str, set[str]]:
    """Extra ("" for the core) -> the names of the packages it needs."""
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    found: dict[str, set[str]] = {}
    for line in email.message_from_string(metadata.read_text()).get_all("Requires-Dist", []):
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        found.setdefault(extra[1] if extra else "", set()).add(re.split(r"[^\w-]", line, maxsplit=1)[0])
    return found


def test_the_core_needs_torch_lightning_and_safetensors_and_the_rest_are_extras(wheel: Path) -> None:
    found = requirements(wheel)
    assert found[""] == {"torch", "lightning", "safetensors"}
    assert {"torchmetrics", "torchvision", "timm", "hydra-core", "omegaconf", "wandb", "scikit-learn"} <= found["train"]
    assert found["joblib"] == {"hydra-joblib-launcher"}
    assert found["submitit"] == {"hydra-submitit-launcher"}
    assert {"wandb", "dev"} <= found.keys()


def test_metadata_names_the_licence_and_the_python_versions(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    fields = email.message_from_string(metadata.read_text())
    assert fields["Name"] == "sparsetrain"
    assert fields["Version"] == sparsetrain.__version__
    assert fields["Requires-Python"] == ">=3.11"
    assert (fields["License-Expression"] or fields["License"]) == "Apache-2.0"


def test_the_wheel_has_the_console_scripts(wheel: Path) -> None:
    (entry_points,) = wheel.glob("*.dist-info/entry_points.txt")
    parsed = configparser.ConfigParser()
    parsed.read(entry_points)
    assert dict(parsed["console_scripts"]) == {
        "sparsetrain-train": "sparsetrain.cli.train:main",
        "sparsetrain-soup": "sparsetrain.cli.soup:main",
    }


def test_the_wheel_has_every_configuration_and_the_type_marker_and_nothing_but_the_package(wheel: Path) -> None:
    expected = {path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    packed = wheel / "sparsetrain" / "conf"
    assert {path.relative_to(packed) for path in packed.rglob("*.yaml")} == expected
    assert expected
    assert (wheel / "sparsetrain" / "py.typed").exists()
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {"sparsetrain"}


def test_the_program_trains_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    # As the console script does it, with the unpacked wheel in the place of an installed one.
    script = (
        "import sys, sparsetrain\n"
        "assert sparsetrain.__file__.startswith(sys.argv.pop(1)), sparsetrain.__file__\n"
        "from sparsetrain.cli.train import main\n"
        "main()"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(wheel),
            "+experiment=digits_gmp",
            "trainer=cpu",
            "trainer.enable_progress_bar=false",
            "trainer.fast_dev_run=true",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs" / "digits_gmp").iterdir()
    assert (run / "summary.json").exists()
