"""An import only goes down: the layers of the package, and which third-party package may be imported where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sparsetrain

ROOT = Path(sparsetrain.__file__).parent

# The first part of a module's name below `sparsetrain` decides its layer.
LAYERS = {
    **dict.fromkeys(
        (
            *("steps", "schedules", "selection", "criteria", "allocation", "patterns", "rounds", "retrain", "rng"),
            *("topk", "nm", "transposable", "choices"),
        ),
        0,
    ),
    **dict.fromkeys(("masks", "mask_files", "stats", "snapshot", "tickets", "gates", "polarization", "modes"), 1),
    **dict.fromkeys(("ops", "report", "soups", "export"), 2),
    **dict.fromkeys(("models", "data"), 3),
    "callbacks": 4,
    **dict.fromkeys(("cli", "conf"), 5),
}
STRANGERS = frozenset({"models", "data"})  # share a layer, but do not meet
PUBLIC = 5  # `sparsetrain/__init__.py` re-exports everything below the application

CORE = frozenset({"torch", "safetensors", "numpy"}) | sys.stdlib_module_names
LIGHTNING = frozenset({"lightning"})
# Of the optional packages: where they may be imported, and whether at the top of a file or only inside a function.
OPTIONAL = {
    "hydra": ({"cli"}, "top"),
    "omegaconf": ({"cli"}, "top"),
    "wandb": ({"cli"}, "function"),
    "rich": ({"cli", "report", "callbacks"}, "function"),
    "matplotlib": ({"report"}, "function"),
    "timm": ({"models"}, "function"),
    "torchmetrics": ({"models"}, "top"),
    "torchvision": ({"models", "data"}, "top"),
    "sklearn": ({"data"}, "function"),
    "scipy": ({"report"}, "function"),
    "triton": ({"ops"}, "top"),
    "torch_pruning": ({"export"}, "function"),
}


class Import(NamedTuple):
    line: int
    module: str
    in_function: bool


def imports(tree: ast.AST, package: str, *, in_function: bool = False) -> Iterator[Import]:
    """Every imported module by its absolute name; `if TYPE_CHECKING:` counts too, for a layer is about knowledge."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            # `from sparsetrain import masks` names a module by its alias.
            yield from (
                Import(node.lineno, f"{module}.{alias.name}" if module == "sparsetrain" else module, in_function)
                for alias in node.names
            )
        else:
            inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, in_function=inside)


def broken_rules(root: Path) -> list[str]:
    """One sentence for each import below `root` that a layer forbids."""
    broken = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        package = ".".join(("sparsetrain", *parts[:-1]))
        here = parts[0]
        if here != "__init__" and here not in LAYERS:
            broken.append(f"{file.relative_to(root)}: '{here}' has no layer; give it one in LAYERS")
            continue
        layer = LAYERS.get(here, PUBLIC)
        for line, module, in_function in imports(ast.parse(file.read_text()), package):
            place = f"{file.relative_to(root)}:{line}"
            top, *below = module.split(".")
            if top == "sparsetrain":
                there = below[0] if below else "__init__"
                if there == "__version__":
                    continue
                if there not in LAYERS:
                    broken.append(f"{place}: imports from the package's front door; import '{there}' from its module")
                elif there != here and (LAYERS[there] > layer or {here, there} == STRANGERS):
                    broken.append(f"{place}: L{layer} '{here}' imports L{LAYERS[there]} '{there}'")
                elif here == "__init__" and LAYERS[there] == PUBLIC:
                    broken.append(f"{place}: the package imports its application '{there}'")
            elif top in OPTIONAL:
                places, depth = OPTIONAL[top]
                if here not in places:
                    broken.append(f"{place}: '{top}' is imported in '{here}', allowed in {sorted(places)}")
                elif depth == "function" and not in_function:
                    broken.append(f"{place}: '{top}' must be imported inside the function that needs it")
            elif top in LIGHTNING:
                if layer < 3:
                    broken.append(f"{place}: L{layer} '{here}' imports '{top}', allowed from L3 on")
            elif top not in CORE:
                broken.append(f"{place}: '{top}' is neither a core nor an optional dependency")
    return broken


def test_every_import_goes_down() -> None:
    assert broken_rules(ROOT) == []


def test_each_broken_rule_is_reported_with_file_line_and_layers(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from sparsetrain.cli.train import main",
        "steps.py": "from sparsetrain.masks import Masks\nimport lightning",
        "masks.py": "from .callbacks import base\nimport hydra",
        "callbacks/base.py": "from sparsetrain import cli\nfrom sparsetrain import Cubic",
        "data/digits.py": "import sklearn.datasets\nfrom ..models import lenet\ndef f():\n    import sklearn",
        "report/plots.py": "import pandas\ndef f():\n    import matplotlib.pyplot",
        "helpers.py": "import torch",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert broken_rules(tmp_path) == [
        "__init__.py:1: the package imports its application 'cli'",
        "callbacks/base.py:1: L4 'callbacks' imports L5 'cli'",
        "callbacks/base.py:2: imports from the package's front door; import 'Cubic' from its module",
        "data/digits.py:1: 'sklearn' must be imported inside the function that needs it",
        "data/digits.py:2: L3 'data' imports L3 'models'",
        "helpers.py: 'helpers' has no layer; give it one in LAYERS",
        "masks.py:1: L1 'masks' imports L4 'callbacks'",
        "masks.py:2: 'hydra' is imported in 'masks', allowed in ['cli']",
        "report/plots.py:1: 'pandas' is neither a core nor an optional dependency",
        "steps.py:1: L0 'steps' imports L1 'masks'",
        "steps.py:2: L0 'steps' imports 'lightning', allowed from L3 on",
    ]


def test_the_package_imports_with_torch_lightning_and_safetensors_alone() -> None:
    # Lightning looks for optional packages itself, so it is imported before they are hidden: None in `sys.modules`
    # makes an import raise.
    code = (
        "import sys, lightning, safetensors.torch, torch\n"
        f"sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))\n"
        "import sparsetrain\n"
        "assert all(hasattr(sparsetrain, name) for name in getattr(sparsetrain, '__all__', ()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
