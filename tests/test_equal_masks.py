"""Torch's two pruning packages are independent references of the masks."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "peers"


@pytest.fixture
def equal_masks(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("equal_masks")


def test_weights_that_do_not_tie_are_chosen_alike(equal_masks):
    assert [equal_masks.compare(task, ties=False)["differ"] for task in equal_masks.TASKS] == [0] * 5


def test_weights_that_tie_are_kept_in_the_same_number(equal_masks):
    for task in equal_masks.TASKS:
        compared = equal_masks.compare(task, ties=True)
        assert compared["ours"] == compared["theirs"]


def test_two_updates_end_at_the_sparsity_of_the_second(equal_masks):
    left = equal_masks.what_is_left()
    assert left["sparsetrain"]["sparsity"] == pytest.approx(0.8, abs=1e-5)
    assert (left["sparsetrain"]["loads"], left["sparsetrain"]["copies"]) == ("yes", "yes")
