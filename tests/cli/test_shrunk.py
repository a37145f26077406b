import json
from pathlib import Path

import pytest
import torch
from conftest import DENSE
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


DURING = "+callbacks.shrink={_target_:sparsetrain.Shrinking,at:10it,input_shape:[1,4,4]}"


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


def test_a_network_that_cannot_be_made_smaller_is_left_with_the_reason(tmp_path):
    # The masked channels are those of the images, which no layer writes.
    with pytest.warns(UserWarning, match=r"No smaller network was written\. Nothing was cut off whole\."):
        train(configuration(tmp_path, *CHANNELS, "method.pruning.where.include=[network.fc1.weight]"))
    assert "shrunk" not in json.loads((tmp_path / "summary.json").read_text())
    assert not (tmp_path / "shrunk").exists()
