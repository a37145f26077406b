"""On two processes the masks and weights are the same, and resume is exact on each."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.harness import assert_same, fit
from conformance.methods import METHODS, Method, every_method
from conformance.ranks import (
    MOMENTS,
    PENALTY,
    EvenModule,
    RankedModule,
    WriteChecksum,
    gate_decisions,
    run_on_two,
)

from sparsetrain.callbacks import L1Penalty

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have written what all their runs ended with."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_on_two(path, port)
    return path


def results(folder: Path, method: Method) -> list[dict[str, Any]]:
    """By rank: the name of a run -> what it ended with."""
    return [torch.load(folder / f"{method.name}-{rank}.pt", weights_only=False) for rank in range(2)]


@every_method
def test_masks_and_weights_are_the_same_on_all_ranks_though_data_and_dropout_differ(folder, method):
    one, other = (found["full"] for found in results(folder, method))
    assert one["batches"] != other["batches"]
    assert not torch.equal(one["outcome"]["random"][0], other["outcome"]["random"][0])
    assert_same(one["outcome"]["masks"], other["outcome"]["masks"])
    weights = [
        {name: value for name, value in found["outcome"]["module"].items() if "running" not in name}
        for found in (one, other)
    ]
    assert_same(*weights)  # batch norm's running statistics are those of each rank's own last batch
    assert_same(one["outcome"]["optimizers"], other["outcome"]["optimizers"])


def test_a_soup_has_the_same_batch_norm_on_all_ranks_though_each_looks_at_other_data(folder):
    methods = {method.name: method for method in METHODS}
    (soup, of_other), (one, other) = (
        [found["full"]["outcome"]["module"] for found in results(folder, methods[name])] for name in ("soup", "rounds")
    )
    assert_same(soup, of_other)
    for name in ("body.1.running_mean", "body.1.running_var"):
        assert not torch.equal(one[name], other[name])  # on the same shares of the data, without a soup


def test_a_penalty_counts_once_so_that_two_ranks_end_with_the_weights_of_one_process(folder):
    one, other = (torch.load(folder / f"penalty-{rank}.pt") for rank in range(2))
    assert_same(one, other)
    penalized, dense = (fit(*added, make=EvenModule).module.state_dict() for added in ([L1Penalty(PENALTY)], []))
    torch.testing.assert_close(one, penalized, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one["head.weight"], dense["head.weight"], rtol=1e-2)


@pytest.mark.filterwarnings("ignore:.* of the gates are undecided")
def test_gates_of_two_ranks_decide_as_those_of_one_process(folder):
    one, other = (torch.load(folder / f"gates-{rank}.pt") for rank in range(2))
    assert_same(one, other)
    alone = gate_decisions()
    torch.testing.assert_close(one["cost"], alone["cost"], rtol=0, atol=1e-6)
    torch.testing.assert_close(one["open"], alone["open"], rtol=0, atol=1e-6)
    assert_same(one["masks"], alone["masks"])
    assert one["closed"] == alone["closed"]
    shares = {share for points in one["open"].values() for _, share in points}
    assert any(0 < share < 1 for share in shares)
    assert one["closed"]


@every_method
@pytest.mark.parametrize("moment", MOMENTS)
def test_each_rank_resumes_bit_identically(folder, method, moment):
    for found in results(folder, method):
        assert_same(found["full"]["outcome"], found[moment]["outcome"])
        saved_at = int(moment.split("-")[1])
        due = {number: made for number, made in found["full"]["batches"].items() if number > saved_at}
        assert_same(due, found[moment]["batches"])


def test_a_weight_changed_on_one_rank_alone_is_refused_on_all_at_the_next_update(folder):
    for rank in range(2):
        message = (folder / f"error-{rank}.txt").read_text()
        assert "The ranks made different masks at step 4" in message
        assert "Do not change weights on one rank alone." in message


def test_processes_that_lightning_spawns_make_the_same_masks(tmp_path):
    settings = {"strategy": "ddp_spawn", "devices": 2, "limit_val_batches": 0}
    fit(METHODS[0].make(), WriteChecksum(tmp_path), make=RankedModule, data={}, max_epochs=2, **settings)
    one, other = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert one == other
    assert one.startswith("2 [")
