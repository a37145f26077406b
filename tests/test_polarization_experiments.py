"""The experiments on smaller networks measure what they say: half of the FLOPs, in the channels that they name."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsetrain.models import CifarResNet
from sparsetrain.report import cost

FOLDER = Path(__file__).parent.parent / "experiments" / "polarization"


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.mark.parametrize("name", ["inner_1", "inner_8", "all_1"])
def test_half_of_the_flops_go_from_the_channels_named(experiment, name):
    speed = experiment("speed")
    dense, example = CifarResNet(14).eval(), torch.randn(1, 3, 8, 8)
    small = speed.smaller(dense, example, speed.REMOVALS[name])
    share = sum(cost(small, example).values()) / sum(cost(dense, example).values())
    assert share == pytest.approx(0.5, abs=0.005 if name.endswith("1") else 0.03)
    streams = [small.conv1.out_channels, small.layer2[0].conv2.out_channels, small.fc.in_features]
    widths = streams + [block.conv1.out_channels for stage in (small.layer1, small.layer2) for block in stage]
    assert (streams == [16, 32, 64]) == name.startswith("inner")
    assert all(width % 8 == 0 for width in widths) == name.endswith("8")


def test_half_of_the_flops_go_with_whole_blocks(experiment):
    speed = experiment("speed")
    dense, example = CifarResNet(56).eval(), torch.randn(1, 3, 8, 8)
    small = speed.smaller(dense, example, speed.REMOVALS["blocks"])
    share = sum(cost(small, example).values()) / sum(cost(dense, example).values())
    assert share == pytest.approx(0.5, abs=0.02)  # a block has 3.7 %
    gone = sum(type(block) is nn.Identity for stage in (small.layer1, small.layer2, small.layer3) for block in stage)
    assert gone == pytest.approx(13, abs=1)


@pytest.mark.slow
def test_the_quick_mode_of_speed_times_every_network_in_every_way(experiment, monkeypatch):
    speed = experiment("speed")
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # it takes ten seconds a network
    results = speed.measure(speed.QUICK)
    for batch in results["cases"]["resnet8"]["batches"]:
        assert set(batch["seconds"]) == {"dense", *speed.REMOVALS}
        for ways in batch["seconds"].values():
            assert {way: len(times) for way, times in ways.items()} == dict.fromkeys(speed.WAYS, 2)
    assert speed.table(results).count("| ResNet-8, 8 px |") == 2 * (1 + len(speed.REMOVALS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The run ended at step 5, before its gates")
def test_a_block_of_the_gates_cost_ends_before_the_gates_do(experiment):
    gates_cost = experiment("gates_cost")
    case = replace(gates_cost.CASES["lenet"], batch=2, blocks=1, steps=4)
    measured = gates_cost.measure_case(case)
    assert {arm: len(seconds) for arm, seconds in measured["seconds"].items()} == dict.fromkeys(gates_cost.ARMS, 1)
