import copy
import functools
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from sparsetrain import BidirectionalWeightPruning, ExactResume
from sparsetrain.data import TextFile
from sparsetrain.models import GPT, Cosine, LanguageModel
from sparsetrain.steps import RunLength

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
CONTEXT = 8


@pytest.fixture
def text(tmp_path: Path) -> TextFile:
    path = tmp_path / "text"
    path.write_bytes(b"to be, or not to be: that is the question. " * 8)
    # 27 blocks of train, 3 of val: batches of 2 and of 1
    return TextFile(path, context=CONTEXT, val_size=30, test_size=90, batch_size=8, eval_batch_size=2, seed=1)


def model(*, dropout: float = 0.1) -> LanguageModel:
    torch.manual_seed(0)
    network = GPT(256, CONTEXT, layers=1, width=16, heads=2, dropout=dropout)
    return LanguageModel(network, optimizer=ADAMW, lr_policy=Cosine(warmup="2it"), num_classes=256)


def trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@torch.no_grad()
def test_loss_perplexity_and_accuracy_are_those_of_all_tokens_together(text):
    module = model().eval()
    for parameter in module.parameters():
        parameter.normal_(std=0.3)  # batches of quite different losses
    logged = trainer().validate(module, datamodule=text, verbose=False)[0]
    logged |= trainer().test(module, datamodule=text, verbose=False)[0]
    for stage, part in (("val", text.splits.val), ("test", text.splits.test)):
        blocks = (len(part) - 1) // CONTEXT
        log_p = module(part[: blocks * CONTEXT].long().view(blocks, CONTEXT)).log_softmax(-1).view(-1, 256)
        targets = part[1 : blocks * CONTEXT + 1].long()
        loss = -log_p[range(len(targets)), targets].double().mean()
        assert logged[f"{stage}/loss"] == pytest.approx(float(loss), rel=1e-5)
        assert logged[f"{stage}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert logged[f"{stage}/accuracy"] == pytest.approx(float((log_p.argmax(1) == targets).double().mean()))


def test_training_is_the_plain_torch_loop_over_tokens(text):
    module = model(dropout=0.0)
    network = copy.deepcopy(module.network)
    run = trainer(max_epochs=1, log_every_n_steps=1)
    run.fit(module, datamodule=text)

    optimizer, batches = ADAMW(network.parameters()), list(text.train_dataloader())
    length = RunLength(steps_per_epoch=len(batches), total_steps=len(batches))
    for step, (inputs, targets) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * Cosine(warmup="2it").factor(step, length)
        optimizer.zero_grad()
        log_p = network(inputs).log_softmax(-1)
        tokens = [log_p[row, place, target] for (row, place), target in np.ndenumerate(targets)]
        loss = -sum(tokens) / len(tokens)
        loss.backward()
        optimizer.step()
    assert run.global_step == len(batches) > 2
    torch.testing.assert_close(run.callback_metrics["train/loss"], loss.detach())
    for trained, expected in zip(module.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


class SaveAt(L.Callback):
    """A checkpoint after some optimizer step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_sparse_run_resumed_within_an_epoch_ends_bit_for_bit_like_the_uninterrupted_one(text, tmp_path):
    path = tmp_path / "half.ckpt"
    whole, resumed = model(), model()
    first = trainer(BidirectionalWeightPruning(), ExactResume(), SaveAt(5, path), max_epochs=3)
    first.fit(whole, datamodule=text)
    again = trainer(BidirectionalWeightPruning(), ExactResume(), max_epochs=3)
    torch.manual_seed(7)
    again.fit(resumed, datamodule=text, ckpt_path=path)
    assert first.global_step == again.global_step > 8
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    for name in ("val/loss", "val/perplexity", "val/accuracy"):
        assert torch.equal(first.callback_metrics[name], again.callback_metrics[name])
    assert not torch.equal(whole.network.head.weight, model().network.head.weight)
