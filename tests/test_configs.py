"""Every configuration composes, and every experiment trains a step."""

from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

import sparsetrain.conf
from sparsetrain.cli import schema
from sparsetrain.cli.instantiate import instantiate
from sparsetrain.cli.train import compose, train

CONF = Path(sparsetrain.conf.__file__).parent
QUIET = ("trainer=cpu", "trainer.enable_progress_bar=false")

# What an option needs beside its name.
NEEDS = {
    "model=timm": ("model.name=resnet18",),
    "model=gpt_small": ("dataset=tiny_shakespeare",),
    "dataset=text_file": ("dataset.path=input.txt", "dataset.val_size=1000", "dataset.test_size=1000"),
    "method=gmp": ("method.schedule.final=0.8",),
    "method=fixed_masks": ("method.masks=masks.safetensors",),
    "method=lottery": ("method.rewind_to=0it",),
    "schedule=constant": ("method.schedule.sparsity=0.8",),
    "schedule=one_shot": ("method.schedule.sparsity=0.8",),
    "schedule=linear": ("method.schedule.final=0.8",),
    "schedule=cubic": ("method.schedule.final=0.8",),
}
BELOW_METHOD = {
    "schedule": ("method=gmp",),
    "criterion": ("method=gmp", "method.schedule.final=0.8"),
    "allocation": ("method=gmp", "method.schedule.final=0.8"),
    "pattern": ("method=gmp", "method.schedule.final=0.8"),
    "retrain": ("method=imp",),
}

# Data that would be a download, at its shape and with its number of classes.
SMALL = (*("dataset.train_size=8", "dataset.val_size=8", "dataset.test_size=8"), "dataset.num_classes=10")
STAND_IN = {
    "cifar10": ("dataset=synthetic", "dataset.shape=[3,32,32]", *SMALL),
    "imagenet": ("dataset=synthetic", "dataset.shape=[3,64,64]", *SMALL),
    # This file is a text, too; the GPT for it is smaller by its number of layers.
    "tiny_shakespeare": (
        *("dataset=text_file", f"dataset.path={__file__}", "dataset.val_size=99", "dataset.test_size=99"),
        *("dataset.context=16", "dataset.batch_size=2", "model.layers=1"),
    ),
}


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def options() -> list[str]:
    files = sorted(CONF.glob("*/*.yaml"))
    return [f"{path.parent.name}={path.stem}" for path in files if path.parent.name != "experiment"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_trains_a_step(experiment: str, tmp_path: Path) -> None:
    dataset = yaml.safe_load((CONF / "dataset" / f"{_choice(experiment)}.yaml").read_text())
    assert dataset["_target_"].startswith("sparsetrain.data.")
    stand_in = STAND_IN.get(_choice(experiment), ())
    cfg = compose(f"+experiment={experiment}", *stand_in, *QUIET, "trainer.fast_dev_run=true", output_dir=tmp_path)
    assert cfg.name == experiment, "a recipe's name is its file's name"
    assert 0.0 <= train(cfg) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("option", options())
def test_every_option_of_every_group_composes(option: str, tmp_path: Path) -> None:
    below = BELOW_METHOD.get(option.split("=")[0], ())
    cfg = compose(*below, option, *NEEDS.get(option, ()), output_dir=tmp_path)
    OmegaConf.resolve(cfg)
    assert OmegaConf.missing_keys(cfg) == set()
    if below:
        instantiate(cfg.method)  # no argument is left over from the option that was there before


def test_every_file_of_our_own_classes_has_a_schema_and_names_its_class() -> None:
    for group, members in schema.SCHEMAS.items():
        for name, target in members.items():
            text = (CONF / group / f"{name}.yaml").read_text()
            assert f"- base_{name}" in text, f"{group}/{name} takes no schema"
            content = yaml.safe_load(text)
            path = content.get("method", content)["_target_"]
            module, _, attribute = path.rpartition(".")
            assert getattr(__import__(module, fromlist=[attribute]), attribute) is target
    files = {(path.parent.name, path.stem) for group in schema.SCHEMAS for path in (CONF / group).glob("*.yaml")}
    assert files - {(group, name) for group, members in schema.SCHEMAS.items() for name in members} == {
        ("method", "dense")  # None has no arguments
    }


def test_the_sparsity_and_the_schedule_are_chosen_by_short_names(tmp_path: Path) -> None:
    cfg = compose(
        "+experiment=digits_gmp",
        "schedule=linear",
        "method.schedule.final=0.9",
        "allocation=erk",
        "criterion=random",
        "seed=3",
        output_dir=tmp_path,
    )
    assert cfg.method.schedule._target_ == "sparsetrain.schedules.Linear"
    assert (cfg.method.schedule.final, cfg.method.schedule.begin) == (0.9, "4ep")
    assert cfg.method.pruning.allocation._target_ == "sparsetrain.allocation.ERK"
    assert cfg.method.pruning.criterion.seed == 3
    assert cfg.dataset.seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.schedule.fnal=0.9", "Key 'fnal' not in 'Cubic'"),
        ("method.schedule.final=abc", "Value 'abc' of type 'str' could not be converted to Float"),
        ("method.schedule.every=[1]", "method.schedule.every"),
        ("method.pruning.where.includes=[a]", "Key 'includes' not in 'Selection'"),
        ("method.pruning.where.include=a", "Invalid value assigned: str is not a ListConfig"),
        ("method.pruning.allocation.floor=some", "Value 'some' of type 'str' could not be converted to Integer"),
        ("method.pruning.allocation.flor=1", "Key 'flor'"),
        ("lr_policy.warmup=[1]", "lr_policy.warmup"),
        ("seed=one", "Value 'one' of type 'str' could not be converted to Integer"),
        ("sed=1", "Key 'sed' not in 'Config'"),
        ("optim.learning_rate=1", "Key 'learning_rate'"),
    ],
)
def test_a_typo_or_a_wrong_type_fails_at_composition(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigCompositionException) as error:
        compose("+experiment=digits_gmp", override, output_dir=tmp_path)
    assert message in f"{error.value}\n{error.value.__cause__}"


def test_an_unknown_experiment_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Could not find 'experiment/nope'") as error:
        compose("+experiment=nope", output_dir=tmp_path)
    assert "digits_gmp" in str(error.value)


def _choice(experiment: str) -> str:
    """The dataset that an experiment or the one that it extends names."""
    defaults = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())["defaults"]
    for entry in defaults:
        if isinstance(entry, dict) and "override /dataset" in entry:
            return str(entry["override /dataset"])
    return _choice(next(entry for entry in defaults if isinstance(entry, str)))
