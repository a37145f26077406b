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
    assert {way: len(values) for way, values in measured.items()} == dict.fromkeys(throughput.WAYS["cpu"], 1)
    assert all(value > 0 for values in measured.values() for value in values)
    assert throughput.table(results).count("| ResNet-20 |") == len(throughput.WAYS["cpu"])


def test_the_clock_begins_after_the_first_steps(throughput, monkeypatch):
    now = iter([10.0, 25.0])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = throughput.Clock
    monkeypatch.setattr(clock, "barrier", SimpleNamespace(wait=lambda timeout: None), raising=False)
    monkeypatch.setattr(clock, "warm", 2, raising=False)
    for step in range(4):
        clock().on_train_batch_start(SimpleNamespace(global_step=step), None, None, step)
    clock().on_train_end(None, None)
    assert clock.seconds == 15.0
