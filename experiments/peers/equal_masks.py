"""Masks and modules beside those of torch's two pruning packages.

    python experiments/peers/equal_masks.py             # a few seconds; writes results/equal_masks.json and the tables
    python experiments/peers/equal_masks.py --report    # the tables only

Both sides prune the same weights by the same score; nothing is trained.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsetrain import NM, Channel, Global, Pruning, Uniform, prune
from sparsetrain.cli.artifacts import git_state
from sparsetrain.models import LeNet300100
from sparsetrain.report import markdown_table, write_between

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that torch.ao goes to another package
    from torch.ao.pruning import WeightNormSparsifier

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "equal_masks.json", HERE / "README.md"
TIES = 1 / 32  # weights are rounded to multiples of it

Masks = dict[str, Tensor]


def layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Those that are pruned, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def by_hooks(module: nn.Module, function: Callable[[nn.Linear], object]) -> Masks:
    """Prune each layer by a function of torch.nn.utils.prune."""
    for layer in layers(module).values():
        function(layer)
    return hook_masks(module)


def hook_masks(module: nn.Module) -> Masks:
    """The masks that torch.nn.utils.prune keeps."""
    return {f"{name}.weight": layer.get_buffer("weight_mask").bool() for name, layer in layers(module).items()}


def all_together(module: nn.Module, sparsity: float) -> Masks:
    """Prune all layers in one ranking by torch.nn.utils.prune."""
    parameters = [(layer, "weight") for layer in layers(module).values()]
    torch_prune.global_unstructured(parameters, pruning_method=torch_prune.L1Unstructured, amount=sparsity)
    return hook_masks(module)


def by_sparsifier(module: nn.Module, **settings: Any) -> Masks:
    """Prune each layer by torch.ao.pruning."""
    prepared(module, **settings).step()
    return {f"{name}.weight": layer.parametrizations.weight[0].mask.bool() for name, layer in layers(module).items()}


def prepared(module: nn.Module, **settings: Any) -> WeightNormSparsifier:
    """A sparsifier of torch.ao.pruning that holds all layers."""
    sparsifier = WeightNormSparsifier(**settings)
    sparsifier.prepare(module, [{"tensor_fqn": f"{name}.weight"} for name in layers(module)])
    return sparsifier


@dataclass(frozen=True)
class Task:
    """What both sides are asked for.

    Args:
        title: what the table calls it.
        peer: the function on the other side.
        theirs: prunes a module, and gives its masks.
        pruning: ours,
        sparsity: and how much.
    """

    title: str
    peer: str
    theirs: Callable[[nn.Module], Masks]
    pruning: Pruning
    sparsity: float


TASKS = (
    Task(
        "80 % of each layer",
        "`prune.l1_unstructured`",
        lambda module: by_hooks(module, lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.8)),
        Pruning(allocation=Uniform()),
        0.8,
    ),
    Task(
        "80 % of each layer",
        "`WeightNormSparsifier(0.8, (1, 1))`",
        lambda module: by_sparsifier(module, sparsity_level=0.8, sparse_block_shape=(1, 1)),
        Pruning(allocation=Uniform()),
        0.8,
    ),
    Task(
        "80 % of all layers together",
        "`prune.global_unstructured`",
        lambda module: all_together(module, 0.8),
        Pruning(allocation=Global(floor=0)),
        0.8,
    ),
    Task(
        "2 of 4",
        "`WeightNormSparsifier(1.0, (1, 4), 2)`",
        lambda module: by_sparsifier(module, sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2),
        Pruning(allocation=Uniform(), pattern=NM(2, 4)),
        0.5,
    ),
    Task(
        "half of the output channels, by L1 norm",
        "`prune.ln_structured`",
        lambda module: by_hooks(module, lambda layer: torch_prune.ln_structured(layer, "weight", 0.5, n=1, dim=0)),
        Pruning(allocation=Uniform(), pattern=Channel()),
        0.5,
    ),
)


def network(*, ties: bool) -> nn.Module:
    """LeNet-300-100 with random weights; with ties many are equal, and many are 0."""
    torch.manual_seed(0)
    module = LeNet300100()
    if ties:
        with torch.no_grad():
            for layer in layers(module).values():
                layer.weight.copy_((layer.weight / TIES).round() * TIES)
    return module


def compare(task: Task, *, ties: bool) -> dict[str, int]:
    """How many weights each side keeps, and on how many they differ."""
    module = network(ties=ties)
    theirs = task.theirs(copy.deepcopy(module))
    ours = prune(module, task.sparsity, task.pruning)
    return {
        "theirs": sum(int(mask.sum()) for mask in theirs.values()),
        "ours": sum(int(mask.sum()) for mask in ours.values()),
        "differ": sum(int((mask != theirs[name]).sum()) for name, mask in ours.items()),
    }


def what_is_left() -> dict[str, dict[str, Any]]:
    """A module pruned to 50 % of each layer and then to 80 %, by each package: what it holds, and what can be done."""
    plain = network(ties=False)

    def twice_by_hooks(module: nn.Module) -> None:
        for amount in (0.5, 0.8):
            by_hooks(module, lambda layer, amount=amount: torch_prune.l1_unstructured(layer, "weight", amount))

    def twice_by_sparsifier(module: nn.Module) -> None:
        sparsifier = prepared(module, sparsity_level=0.5, sparse_block_shape=(1, 1))
        sparsifier.step()
        for group in sparsifier.groups:
            group["sparsity_level"] = 0.8
        sparsifier.step()

    def twice_by_masks(module: nn.Module) -> None:
        for sparsity in (0.5, 0.8):
            prune(module, sparsity, Pruning(allocation=Uniform()))

    ways = {
        "`torch.nn.utils.prune`": twice_by_hooks,
        "`torch.ao.pruning`": twice_by_sparsifier,
        "sparsetrain": twice_by_masks,
    }
    found = {}
    for name, way in ways.items():
        module = copy.deepcopy(plain)
        way(module)
        weights = [layer.weight for layer in layers(module).values()]
        found[name] = {
            "sparsity": sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights),
            "loads": _works(lambda module=module: network(ties=False).load_state_dict(module.state_dict())),
            "copies": _works(lambda module=module: copy.deepcopy(module)),
        }
    return found


def _works(action: Callable[[], object]) -> str:
    """Say yes, or the name of the error."""
    try:
        action()
    except Exception as error:  # whatever it is, it is the finding
        return type(error).__name__
    return "yes"


def measure() -> dict[str, Any]:
    """All tasks with and without ties, and what is left in a module."""
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch")},
        "tasks": [
            {"title": task.title, "peer": task.peer}
            | {"distinct": compare(task, ties=False), "ties": compare(task, ties=True)}
            for task in TASKS
        ],
        "left": what_is_left(),
    }


def tables(results: Mapping[str, Any]) -> str:
    """Whether masks are equal, what a module holds afterwards, and with what it was found."""
    lines = [
        (
            *(task["title"], task["peer"], f"{task['distinct']['theirs']:,}", f"{task['distinct']['ours']:,}"),
            *(f"{task[kind]['differ']:,}" for kind in ("distinct", "ties")),
        )
        for task in results["tasks"]
    ]
    header = ("asked", "peer", "weights kept by the peer", "by us", "choices that differ", "the same where weights tie")
    left = [
        (name, f"{found['sparsity']:.2%}", found["loads"], found["copies"]) for name, found in results["left"].items()
    ]
    header_left = (
        *("package", "sparsity after 50 % and then 80 %"),
        *("its `state_dict` loads into the plain module", "`copy.deepcopy`"),
    )
    commit = results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    origin = f"{software}; {results['date']}, commit {commit}."
    return "\n\n".join((markdown_table(header, lines), markdown_table(header_left, left), origin))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the tables")
    if not parser.parse_args().report:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    write_between(README, "equal_masks", tables(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
