"""A monitored ModelCheckpoint keeps the best of the sparse network, not of the dense phase."""

import pytest
import torch
from conformance.harness import PlainModule, fit
from conformance.methods import METHODS, every_method
from conformance.test_never_revived import Alternating
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from sparsetrain import GradualMagnitudePruning, OneShot, Pruning, Selection, SparsityCallback


@every_method
def test_only_networks_of_the_final_sparsity_are_kept(tmp_path, method):
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)
    run = fit(method.make(), best)
    kept = sorted(tmp_path.glob("*.ckpt"))
    assert kept
    total = sum(mask.numel() for mask in run.callback.masks.values())
    for path in kept:
        weights = torch.load(path, weights_only=True)["state_dict"]
        zeros = sum(int((weights[name] == 0).sum()) for name in run.callback.masks)
        assert zeros == pytest.approx(method.sparsity * total, abs=0.51)


@every_method
def test_the_best_of_them_is_the_one_with_the_best_metric(tmp_path, method):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    run = fit(method.make(), best, val_check_interval=2)
    final = run.callback.history[-1].step if run.callback.history else -1
    after = [value for batches, value in run.trace.validations.items() if batches > final]
    assert float(best.best_model_score) == min(after)


@every_method
def test_the_last_checkpoint_is_saved_all_the_while(tmp_path, method):
    seen: list[bool] = []

    class Look(PlainModule):
        def on_train_epoch_start(self) -> None:
            seen.append((tmp_path / "last.ckpt").exists())

    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    fit(method.make(), best, make=Look)
    assert seen == [False, True, True]


def test_the_run_says_from_which_step_on_checkpoints_are_kept(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(METHODS[0].make(), ModelCheckpoint(tmp_path, monitor="val/loss"))
    assert "Monitored checkpoints are kept once the final sparsity is reached (step 11)" in caplog.text


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("ends", ["fit", "exception"])
@pytest.mark.parametrize("first", [True, False], ids=["early_first", "late_first"])
def test_a_checkpoint_waits_for_all_of_several_callbacks_and_then_has_its_settings_back(tmp_path, first, ends):
    def one(include: str, at: int) -> GradualMagnitudePruning:
        return GradualMagnitudePruning(OneShot(0.8, at=at), pruning=Pruning(Selection((include,))))

    class Broken(PlainModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.fit_loop.total_batch_idx == 8:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    early, late = one("head.weight", 2), one("body.5.weight", 11)
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1, save_last=True)
    order = (early, late) if first else (late, early)
    for _ in range(2):
        if ends == "exception":
            with pytest.raises(RuntimeError, match="out of luck"):
                fit(*order, best, make=Broken)
            assert not best.best_k_models
        else:
            fit(*order, best)
            assert {path.name[:7] for path in tmp_path.glob("step*.ckpt")} == {"step=15"}
        assert (best.save_top_k, best.save_last) == (-1, True)


@every_method
def test_an_unmonitored_checkpoint_is_left_alone(tmp_path, method):
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(method.make(), every)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_early_stopping_ends_a_sparse_run(tmp_path):
    stop = EarlyStopping("train/loss", patience=0, divergence_threshold=0.0)
    with pytest.warns(
        UserWarning, match=r"The run ended at step \d+ with sparsity 0\.\d+, before the update to 0.8 at step"
    ):
        run = fit(METHODS[0].make(), stop)
    assert run.trainer.current_epoch < 3


class Halved(SparsityCallback):
    """Prunes half before step 5."""

    def target(self, step: int) -> float | None:
        return 0.5 if step == 5 else None


def test_where_the_end_of_the_run_is_not_known_nothing_is_held_back(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    run = fit(Halved(), best, make=Alternating, max_epochs=-1, max_steps=30)
    assert run.callback.total_steps is None
    assert best.best_model_path
