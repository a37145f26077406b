from collections.abc import Mapping
from typing import Any

import pytest
import torch
from callbacks.recording import Quiet, Record, imp, recorded
from conformance.harness import SaveEverywhere, TinyModule, assert_same, differences
from torch import Tensor
from torch.optim import Adam

from sparsetrain import IterativeMagnitudePruning


def sgd() -> TinyModule:
    return Quiet()


def adam() -> TinyModule:
    return Quiet(lambda parameters: Adam(parameters, lr=0.01, weight_decay=1e-3))


def without_pruned(state: Mapping[str, dict[str, Any]], masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Zero wherever a tensor of a weight's shape belongs to a pruned weight."""
    return {
        name: {
            key: value.masked_fill(~masks[name], 0)
            if name in masks and isinstance(value, Tensor) and value.shape == masks[name].shape
            else value
            for key, value in entries.items()
        }
        for name, entries in state.items()
    }


def is_fresh(state: Mapping[str, dict[str, Any]]) -> bool:
    return not any(value is not None for entries in state.values() for value in entries.values())


every_optimizer = pytest.mark.parametrize("make", [sgd, adam])


@every_optimizer
@pytest.mark.parametrize("rewind_to", ["0ep", "1ep"])
@pytest.mark.parametrize("weights", ["keep", "rewind"])
def test_reset_begins_each_round_without_optimizer_state(make, rewind_to, weights):
    _, record = recorded(imp(rewind_to=rewind_to, weights=weights, optimizer_state="reset"), make=make)
    for start in (10, 20 if rewind_to == "0ep" else 15):
        assert is_fresh(record.starts[start].optimizer)
        assert not is_fresh(record.ends[start - 1].optimizer)
        fresh = make()
        fresh.load_state_dict(record.starts[start].module)
        for name, parameter in fresh.named_parameters():
            parameter.grad = record.grads[start][name]
        optimizer = fresh.configure_optimizers()
        optimizer.step()
        after = record.ends[start]
        for name, parameter in fresh.named_parameters():
            assert torch.equal(parameter, after.module[name]), name
            assert_same(dict(optimizer.state[parameter]), after.optimizer[name])


@every_optimizer
@pytest.mark.parametrize("weights", ["keep", "rewind"])
def test_snapshot_begins_each_round_with_the_optimizer_state_of_step_k(make, weights):
    before = Record()
    run, record = recorded(imp(rewind_to="1ep", weights=weights, optimizer_state="snapshot"), before, make=make)
    origin = before.starts[5].optimizer
    assert len(origin) == len(list(run.module.parameters()))
    for start in (10, 15):
        now = record.starts[start]
        assert_same(now.optimizer, without_pruned(origin, now.masks))
        if make is adam:
            assert all(float(entries["step"]) == 5 for entries in now.optimizer.values())
            assert all(float(entries["step"]) == 6 for entries in record.ends[start].optimizer.values())


@every_optimizer
def test_a_snapshot_of_step_0_is_no_state(make):
    _, record = recorded(imp(optimizer_state="snapshot"), make=make)
    assert all(is_fresh(record.starts[start].optimizer) for start in (10, 20))


@every_optimizer
@pytest.mark.parametrize("weights", ["keep", "rewind"])
def test_keep_begins_each_round_with_the_optimizer_state_of_the_last_step(make, weights):
    before = Record()
    _, record = recorded(imp(rewind_to="1ep", weights=weights, optimizer_state="keep"), before, make=make)
    for start in (10, 15):
        now = record.starts[start]
        assert_same(now.optimizer, without_pruned(record.ends[start - 1].optimizer, now.masks))
        assert list(differences(now.optimizer, record.ends[start - 1].optimizer))
        if make is adam:
            assert all(float(entries["step"]) == start for entries in now.optimizer.values())


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("choice", ["keep", "reset", "snapshot"])
def test_optimizer_state_is_the_same_in_a_run_resumed_in_a_later_round(tmp_path, make, choice):
    def callback() -> IterativeMagnitudePruning:
        return imp(rounds=3, rewind_to="1ep", optimizer_state=choice)

    saver = SaveEverywhere(tmp_path)
    _, whole = recorded(callback(), saver, make=make)
    for batches in (12, 15):
        saved = next(saved for saved in saver.saved if saved.batches == batches)
        _, part = recorded(callback(), make=make, ckpt_path=saved.path)
        assert_same(part.starts[20].optimizer, whole.starts[20].optimizer)
        assert_same(part.starts[15].optimizer, whole.starts[15].optimizer)
