import json
from pathlib import Path

import pytest
import torch
from conftest import DENSE, QUIET
from omegaconf import DictConfig
from safetensors.torch import load_file

from sparsetrain.cli.train import compose, train
from sparsetrain.export import load_shrunk
from sparsetrain.models import LeNet300100
from sparsetrain.report import cost

CHANNELS = ("method=gmp", "method.schedule.final=0.5", "method.schedule.begin=1it", "method.schedule.end=8it")
CHANNELS += ("method.schedule.every=2it", "allocation=uniform", "pattern=channel")
GATES = ("method=polarize", "method.hidden=null", "method.gate_lr=0.5", "method.extract_at=8it")
GATES += ("method.polarization={final:1.0,begin:0,end:4it}", "method.begin=0it", "method.end=4it", "method.budget=10.0")


def configuration(folder: Path, *overrides: str) -> DictConfig:
    return compose(*DENSE, *overrides, output_dir=folder)


DURING = "+callbacks.shrink={_target_:sparsetrain.Shrinking,at:10it}"


@pytest.mark.parametrize("method", [CHANNELS, GATES, (*GATES, DURING)], ids=["channels", "gates", "gates, in the fit"])
def test_a_run_leaves_the_smaller_network_with_the_same_outputs_and_its_cost_and_metrics(method, tmp_path):
    exclude = ("method.pruning.where.exclude=[network.fc1.weight]",) if method is CHANNELS else ()
    during = DURING in method
    train(configuration(tmp_path, *method, *exclude))
    summary = json.loads((tmp_path / "summary.json").read_text())
    network = LeNet300100((1, 4, 4), num_classes=3)
    small = load_shrunk(network, tmp_path / "shrunk")
    (small if during else network).load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = torch.randn(5, 1, 4, 4)
    if not during:
        with torch.no_grad():
            torch.testing.assert_close(small(images), network(images))
    facts, dense = summary["shrunk"], sum(cost(network, images).values())
    assert facts["flops"] == sum(cost(small, images).values()) < 0.7 * dense
    assert facts["parameters"] == sum(parameter.numel() for parameter in small.parameters())
    assert facts["test"] == pytest.approx(summary["test"], abs=1e-6)
    assert ("extraction" in summary) == (method is not CHANNELS)
    assert method is CHANNELS or summary["extraction"]["cost"] == pytest.approx(facts["flops"] / dense)
    assert (tmp_path / "gates.png").exists() == (method is not CHANNELS)


def assert_smaller_is_the_same(folder: Path) -> None:
    """What a run of LeNet has left in shrunk/ computes what its network does, and has its test metrics."""
    network = LeNet300100((1, 4, 4), num_classes=3)
    small = load_shrunk(network, folder / "shrunk")
    network.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.randn(5, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["shrunk"]["test"] == pytest.approx(summary["test"], abs=1e-6)


def test_the_smaller_network_of_a_soup_computes_what_the_soup_does_not_its_last_ingredient(tmp_path):
    soup = ("method=soup", "method.rounds=1", "method.round_length=1ep", "method.ingredients=2", "method.sparsity=0.5")
    exclude = ("method.pruning.where.exclude=[network.fc1.weight]", "trainer.max_epochs=-1")
    train(configuration(tmp_path, *soup, *exclude, "allocation=uniform", "pattern=channel"))
    assert_smaller_is_the_same(tmp_path)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_network_of_another_dtype_is_counted_and_made_smaller_as_one_of_float32(precision, tmp_path):
    exclude = "method.pruning.where.exclude=[network.fc1.weight]"
    summaries = []
    for name in (precision, "32-true"):
        train(configuration(tmp_path / name, *CHANNELS, exclude, f"trainer.precision={name}"))
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    one, other = summaries
    assert one["dense_flops"] == other["dense_flops"]
    assert one["shrunk"]["flops"] < 0.7 * one["dense_flops"]
    assert one["shrunk"]["test"] == pytest.approx(one["test"], abs=1e-2)


def test_a_language_model_can_be_gated_and_made_smaller_in_the_fit_on_tokens_like_those_of_its_text(tmp_path):
    text = tmp_path / "text"
    text.write_text("abcdefghijklmnop" * 60)
    data = ("dataset=text_file", f"dataset.path={text}", "dataset.val_size=96", "dataset.test_size=96")
    data += ("dataset.context=8", "dataset.batch_size=32")
    model = ("module._target_=sparsetrain.models.LanguageModel", "model=gpt_small", "model.layers=1")
    model += ("model.width=16", "model.heads=2", "lr_policy.warmup=0it")
    gates = ("method=polarize", "method.hidden=null", "method.sparsity=0.1", "method.extract_at=2it")
    gates += ("method.polarization={final:1.0,begin:0,end:1it}", "method.begin=0it", "method.end=1it")
    shrink = "+callbacks.shrink={_target_:sparsetrain.Shrinking,at:3it}"
    run = (*QUIET, "trainer.max_epochs=-1", "trainer.max_steps=4")
    train(compose(*run, *data, *model, *gates, shrink, output_dir=tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["extraction"]["closed"] > 0
    assert summary["shrunk"]["parameters"] == summary["parameters"]


def test_a_network_that_cannot_be_made_smaller_is_left_with_the_reason(tmp_path):
    # The masked channels are those of the images, which no layer writes.
    with pytest.warns(UserWarning, match=r"No smaller network was written\. Nothing was cut off whole\."):
        train(configuration(tmp_path, *CHANNELS, "method.pruning.where.include=[network.fc1.weight]"))
    assert "shrunk" not in json.loads((tmp_path / "summary.json").read_text())
    assert not (tmp_path / "shrunk").exists()
