"""A dense tail after N:M training, by `sparse_until`.

It has no row in `conformance.methods`: there a network is sparse at every moment from its last update on, in the last
checkpoint before the end of the fit too, while the layers of a tail are dense up to that end.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.nm_network import (
    BDWP,
    LR,
    STE,
    Batch,
    Master,
    MasterAtStart,
    Matrices,
    Regression,
    SaveOnce,
    batches,
    both_directions,
    conv_net,
    is_n_of_m,
    kinds,
    mlp,
    seeded,
    sorted_mask,
    train,
    transposable,
    validation_loss,
)
from callbacks.test_base import Metrics
from conformance.harness import STEPS, PlainModule, SaveEverywhere, TinyModule, assert_same, fit
from conformance.test_dense_loadable import Snapshots, outputs
from conformance.test_exact_resume import resume_everywhere
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from sparsetrain.masks import masks_in

UNTIL = 8  # in the second of the harness's three epochs of five steps
FINALS = ["sparse", "dense"]


class WithTail(Matrices):
    """The network trained by hand, all of whose masks are True from step `until` on."""

    def __init__(self, *arguments: Any, until: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.until = until

    def step(self, micro_batches: Sequence[Batch]) -> None:
        if self.steps >= self.until:
            self.dense, self.refresh = range(len(self.net)), 1
        super().step(micro_batches)


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize(
    ("make", "method", "rules", "accumulate"),
    [
        pytest.param(mlp, partial(BDWP, decay=0.05), {"masks": both_directions(2, 4), "dense": [4]}, 2, id="bdwp"),
        pytest.param(
            conv_net, partial(STE, decay=0.05, transposable=True, refresh="3it"),
            {"masks": transposable, "refresh": 3}, 1, id="transposable",
        ),
    ],
)  # fmt: skip
def test_a_run_equals_a_loop_by_hand_and_leaves_what_final_says(make, method, rules, accumulate, final):
    net, record, callback = seeded(make), Master(), method(sparse_until="0.6run", final=final)
    data, hooks = batches(net, 7 * accumulate), [len(layer._forward_pre_hooks) for layer in net]
    reference = WithTail(net, **rules, decay=0.05, until=4)
    module, _ = train(Regression(net), data, callback, record, accumulate_grad_batches=accumulate, precision="64-true")
    for expected, master in zip(
        reference.train(data, accumulate), record.masters[accumulate - 1 :: accumulate], strict=True
    ):
        for name, weight in master.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-12)
    left = dict(module.named_parameters())
    for name, weight in reference.weights.items():
        mask = torch.ones_like(weight, dtype=torch.bool)
        if final == "sparse" and f"net.{name}" in callback.masks:
            mask = reference.masks_of(weight)[0]
        torch.testing.assert_close(left[f"net.{name}"].detach(), weight * mask, rtol=1e-12, atol=1e-12)
        assert torch.equal(callback.masks.get(f"net.{name}", mask), mask)
    assert kinds(module.net) == kinds(make())
    assert [len(layer._forward_pre_hooks) for layer in module.net] == hooks
    assert callback.at_target


def test_a_tail_that_keeps_its_masks_or_its_decay_trains_another_network():
    net = seeded(mlp)
    data = batches(net, 3)
    rules: dict[str, Any] = {"masks": both_directions(2, 4), "dense": [4], "decay": 0.5}
    *_, tail = WithTail(net, **rules, until=2).train(data)
    *_, none = Matrices(net, **rules).train(data)
    assert (tail["net.0.weight"] - none["net.0.weight"]).abs().max() > 10 * LR * 1e-3


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(partial(BDWP, decay=0.1), id="bdwp-sparse"),
        pytest.param(partial(STE, transposable=True, refresh="5it", final="dense"), id="transposable-dense"),
    ],
)
def test_killed_before_at_and_after_the_switch_and_at_the_end_it_resumes_bit_identically(tmp_path, method):
    def make() -> list[L.Callback]:
        return [method(sparse_until=UNTIL)]

    moments = (UNTIL - 1, UNTIL, UNTIL + 1, STEPS)
    assert not resume_everywhere(tmp_path, make, moments=lambda saved: saved.batches in moments)


def test_resumed_in_the_tail_it_still_says_on_which_backend_its_layers_ran(tmp_path):
    saver = SaveEverywhere(tmp_path)
    full = fit(BDWP(sparse_until=UNTIL), saver)
    resumed = fit(BDWP(sparse_until=UNTIL), ckpt_path=saver.saved[-1].path)
    assert full.callback.decisions
    assert resumed.callback.decisions == full.callback.decisions


def test_with_weight_averaging_it_resumes_bit_identically(tmp_path):
    def make() -> list[L.Callback]:
        return [STE(decay=0.1, refresh="5it", sparse_until=UNTIL), EMAWeightAveraging(decay=0.5)]

    assert not resume_everywhere(tmp_path, make, moments=lambda saved: saved.batches in (UNTIL - 1, UNTIL, 10))


@pytest.mark.parametrize("final", FINALS)
def test_each_checkpoint_is_the_network_in_use_sparse_before_the_switch_and_dense_after_it(tmp_path, final):
    callback, saver = BDWP(decay=0.1, sparse_until=UNTIL, final=final), Snapshots(tmp_path)
    fit(callback, saver)
    kept = {}
    for saved, expected in zip(saver.saved, saver.outputs, strict=True):
        checkpoint = torch.load(saved.path, weights_only=True)
        plain = TinyModule()
        plain.load_state_dict(checkpoint["state_dict"], strict=True)
        assert torch.equal(outputs(plain), expected), saved
        state = checkpoint["callbacks"][callback.state_key]
        (mask,) = masks_in(state).values()
        weight = checkpoint["state_dict"]["body.5.weight"]
        assert torch.equal(weight != 0, mask)
        kept[state["step"]] = float(mask.float().mean())
    assert kept == {step: 0.5 if step < UNTIL else 1.0 for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("final", FINALS)
def test_the_average_is_validated_and_saved_dense_in_the_tail(tmp_path, final):
    saver = SaveOnce(tmp_path, epoch=2)
    run = fit(BDWP(sparse_until=UNTIL, final=final), EMAWeightAveraging(decay=0.5), saver)
    state, average = torch.load(saver.full, weights_only=True)["state_dict"], saver.average["module.body.5.weight"]
    assert torch.equal(state["body.5.weight"], average)
    assert not is_n_of_m(average)
    plain = TinyModule()
    plain.load_state_dict(state, strict=True)
    assert validation_loss(plain) == saver.loss
    mask = sorted_mask(average, 2, 4, 1) if final == "sparse" else torch.tensor(1)
    assert torch.equal(run.module.body[5].weight.detach(), average * mask)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the checkpoint callback, left out
@pytest.mark.parametrize("final", FINALS)
def test_a_checkpoint_of_the_end_of_the_fit_continues_with_the_master(tmp_path, final):
    def method() -> BDWP:
        return BDWP(decay=0.1, sparse_until=UNTIL, final=final)

    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_epochs=10)
    full = Master()
    fit(method(), full, max_epochs=4, make=PlainModule)
    run = fit(method(), last, make=PlainModule)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("last.ckpt", "after.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)["state_dict"]["body.5.weight"]
        assert torch.equal(saved, run.module.body[5].weight)
        assert is_n_of_m(saved) == (final == "sparse")
        again = Master()
        fit(method(), again, max_epochs=4, make=PlainModule, ckpt_path=tmp_path / name)
        assert_same(again.masters, full.masters[STEPS:])


def test_after_a_sparse_end_a_checkpoint_holds_the_average_sparse_and_continues_with_its_master(tmp_path):
    def callbacks() -> list[L.Callback]:
        return [BDWP(sparse_until=UNTIL), EMAWeightAveraging(decay=0.5)]

    saver, start = SaveOnce(tmp_path, epoch=2), MasterAtStart()
    run = fit(*callbacks(), saver)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert is_n_of_m(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]["body.5.weight"])
    fit(*callbacks(), start, max_epochs=4, ckpt_path=tmp_path / "after.ckpt", make=PlainModule)
    assert_same(start.average, saver.average)


def test_resumed_into_a_longer_run_that_is_still_sparse_it_is_sparse_again(tmp_path):
    def method() -> STE:
        return STE(decay=0.1, refresh="4it", sparse_until="0.5run")

    saver, metrics = SaveOnce(tmp_path), Metrics()
    fit(method(), saver, make=PlainModule)  # saved at step 10, in a tail from step 8 on
    fit(method(), metrics, max_epochs=5, make=PlainModule, ckpt_path=saver.full)
    # Steps 11 to 25; the tail begins when 13 have been made.
    assert [logged["sparsity/actual"] for logged in metrics.logged] == [0.5] * 2 + [0.0] * 13


@pytest.mark.parametrize("final", FINALS)
def test_a_monitored_checkpoint_keeps_networks_of_the_kind_that_is_left(tmp_path, final, caplog):
    def kept(ckpt_path: Path | None = None) -> dict[int, bool]:
        """Step of each checkpoint that is kept -> whether its network is N:M."""
        shutil.rmtree(tmp_path / "best", ignore_errors=True)
        best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_top_k=-1)
        fit(BDWP(sparse_until=UNTIL, final=final), best, saver, ckpt_path=ckpt_path)
        assert best.save_top_k == -1
        weights = {
            int(path.stem.removeprefix("step=")): torch.load(path, weights_only=True)["state_dict"]["body.5.weight"]
            for path in (tmp_path / "best").glob("*.ckpt")
        }
        return {step: is_n_of_m(weight) for step, weight in weights.items()}

    saver = SaveOnce(tmp_path)
    with caplog.at_level("INFO"):
        found = kept()
    assert found == ({5: True} if final == "sparse" else {10: False, 15: False})
    assert caplog.text.count("From step 8 on the N:M layers are dense.") == 1
    assert caplog.text.count("Monitored checkpoints") == 1
    assert kept(saver.full) == ({} if final == "sparse" else {10: False, 15: False})  # resumed before it is kept


def test_what_is_logged_follows_the_layers():
    for final in FINALS:
        metrics = Metrics()
        fit(BDWP(sparse_until=UNTIL, final=final), metrics)
        seen = [(logged["sparsity/actual"], logged["sparsity/at_target"]) for logged in metrics.logged]
        sparse, dense = (0.5, float(final == "sparse")), (0.0, float(final == "dense"))
        assert seen == [sparse] * (UNTIL - 1) + [dense] * (STEPS - UNTIL + 1)


@pytest.mark.parametrize("final", FINALS)
def test_a_fast_development_run_switches_after_its_last_step(final):
    run = fit(BDWP(sparse_until="5ep", final=final), make=PlainModule, fast_dev_run=2)
    assert run.callback.step == 2
    assert is_n_of_m(run.module.body[5].weight) == (final == "sparse")
    assert run.callback.masks.sparsity() == (0.5 if final == "sparse" else 0.0)


def test_a_run_that_ends_before_its_tail_leaves_n_of_m_and_says_so():
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ended at step 5, before its dense tail \(step 8\): its weights are N:M"):
        run = fit(BDWP(sparse_until=UNTIL, final="dense"), Stop())
    assert is_n_of_m(run.module.body[5].weight)
    assert run.callback.masks.sparsity() == 0.5
    fit(BDWP(sparse_until=UNTIL), Stop())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_until": "soon"}, r"^sparse_until: 'soon'"),
        ({"sparse_until": 3, "final": "both"}, r"^final='both' is unknown\. Choose one of 'sparse', 'dense'\.$"),
        ({"final": "dense"}, r"^final='dense' would leave weights that no product of the run has used\. Give sparse"),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        BDWP(**settings)


@pytest.mark.parametrize(("until", "step"), [("1run", 15), ("0it", 0), ("4ep", 20)])
def test_a_tail_without_a_step_or_without_a_step_before_it_is_refused(until, step):
    message = rf"^sparse_until='{until}' is step {step}; it must be at least 1, and at most 14 in a run of 15 steps\."
    module = PlainModule()
    with pytest.raises(ValueError, match=message):
        fit(BDWP(sparse_until=until), make=lambda: module)
    assert kinds(module) == kinds(PlainModule())
