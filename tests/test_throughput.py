"""The experiment on throughput times what it says."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "throughput")
    return importlib.import_module("throughput")


@pytest.mark.slow
def test_the_quick_mode_measures_every_way(throughput):
    results = throughput.measure(throughput.QUICK, "cpu")
    measured = results["cases"]["quick"]["images_per_s"]
    assert {way: len(values) for way, values in measured.items()} == dict.fromkeys(throughput.WAYS["cpu"], 2)
    assert all(value > 0 for values in measured.values() for value in values)
    assert throughput.table(results).count("| ResNet-20 |") == len(throughput.WAYS["cpu"])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_turn_is_timed_without_its_first_step(throughput, monkeypatch, place):
    now = iter([10.0, 25.0, 100.0, 103.0])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    log = []
    case = throughput.Case("two turns", (), batch=4, epoch=8, warm=2, turns=2, turn=3)
    turns = throughput.Turns(SimpleNamespace(wait=lambda timeout: log.append("wait")), place, 3, case)
    for step in range(8):
        turns.before(step)
        log.append(step)
    turns.end()
    assert turns.seconds == [15.0, 3.0]
    before, after = ["wait"] * place, ["wait"] * (3 - place)
    assert log == [0, 1, "wait", *before, 2, 3, 4, *after, *before, 5, 6, 7, *after]


def test_steps_that_make_no_epoch_are_refused(throughput):
    with pytest.raises(ValueError, match="odd: 1 steps make no epoch"):
        _ = throughput.Case("odd", (), batch=4, epoch=8, warm=3, turns=2, turn=3).epochs


def test_a_share_is_the_median_of_those_of_neighbouring_turns(throughput):
    ways = {way: [10.0, 30.0, 20.0] for way in throughput.WAYS["cpu"]} | {"run": [9.0, 9.0, 18.0]}
    case = {"title": "ResNet-20", "images_per_s": ways}
    results = {"kind": "cpu", "cases": {"one": case}, "git": None, "versions": {}, "device": "", "date": ""}
    assert "0.900 of loop" in throughput.table(results | {"load_before": 0.0})  # of medians: 9 / 20
