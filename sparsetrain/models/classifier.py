"""One LightningModule for image classifiers: cross-entropy, top-k accuracy, a per-step learning-rate policy."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sparsetrain.models.lr import LRPolicy
from sparsetrain.steps import RunLength

Batch = tuple[Tensor, Tensor]

_COMPILE_MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch's default backend


class Classifier(L.LightningModule):
    """Trains `network` to classify, and logs loss and accuracy as train/..., val/... and test/....

    A batch is (images, labels): images are floats, normalised by the loader, shape (batch, ...); labels are class
    indices, shape (batch,), int64. train/loss is logged at every step, everything else once an epoch: <stage>/accuracy
    is top-1, <stage>/top5 and other k follow `top_k`. Losses of validation and test are plain cross-entropies, without
    label smoothing.

    After a resume from the middle of an epoch, the train accuracy of that epoch covers its remaining steps only.

    Checkpoints hold tensors and primitives only (no hyperparameters: a network is none), so they load with
    `weights_only=True`; give `load_from_checkpoint` the constructor's arguments again.

    Args:
        network: images -> logits of shape (batch, num_classes).
        optimizer: parameters or parameter groups -> optimizer, such as `functools.partial(torch.optim.SGD, lr=0.1)`.
        lr_policy: factor on the optimizer's learning rate, set at every optimizer step; None leaves it constant.
        num_classes: number of classes, at least 2.
        label_smoothing: share of the training target that is spread evenly over the classes, in [0, 1).
        channels_last: keep images and 4-D weights in the channels-last memory format.
        compile: compile the network: True for torch's default backend; one of its modes, such as "reduce-overhead",
            which replays CUDA graphs; or the name of another backend, such as "aot_eager". Parameter names stay as they
            are.
        top_k: the k of the top-k accuracies beside top-1, which is always logged; k >= num_classes is left out.
        no_decay: exclude biases and norms, which is every parameter with at most one dimension, from weight decay.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Callable[[Any], Optimizer],
        lr_policy: LRPolicy | None = None,
        num_classes: int,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool | str = False,
        top_k: tuple[int, ...] = (1, 5),
        no_decay: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Classifier needs at least 2 classes; got num_classes={num_classes}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share of the target, in [0, 1); got {label_smoothing}.")
        if not all(k >= 1 for k in top_k):
            raise ValueError(f"Every k of top_k must be at least 1; got {tuple(top_k)}.")
        self.network = network
        self.optimizer, self.lr_policy = optimizer, lr_policy
        self.label_smoothing, self.no_decay = label_smoothing, no_decay
        self.channels_last, self.compiler = channels_last, compile
        metrics = _accuracies(num_classes, top_k)
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        if channels_last:
            # Loading a state_dict copies into these tensors, so the format outlives it.
            network.to(memory_format=torch.channels_last)
        self._compile_network()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile again: torch drops a module's compiled call when it is pickled or deep-copied."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile_network()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, num_classes), of images, shape (batch, ...)."""
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def predictions(self, batch: Batch) -> Batch:
        """Logits, shape (examples, num_classes), and labels, shape (examples,), of a batch."""
        images, labels = batch
        return self(images), labels

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The training loss, a scalar."""
        logits, labels = self.predictions(batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_metrics.update(logits.detach(), labels)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(labels))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_accuracies(self.train_metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log val/loss and the accuracies."""
        self._evaluate(batch, "val", self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_accuracies(self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log test/loss and the accuracies."""
        self._evaluate(batch, "test", self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_accuracies(self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trainable parameters, and its learning-rate policy.

        Raises:
            ValueError: the optimizer has no such setting.
        """
        try:
            optimizer = self.optimizer(self._parameter_groups())
        except TypeError as error:
            raise ValueError(f"The optimizer refuses its settings: {error}. Change optim.*.") from error
        policy = self.lr_policy
        if policy is None:
            return optimizer
        run = self._run_length()

        # A plain function: LambdaLR saves the attributes of any other callable in the checkpoint.
        def factor(step: int) -> float:
            return policy.factor(step, run)

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def _evaluate(self, batch: Batch, stage: str, metrics: MetricCollection) -> None:
        logits, labels = self.predictions(batch)
        metrics.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)

    def _log_accuracies(self, metrics: MetricCollection) -> None:
        # Once an epoch: Lightning's log_dict costs the same at each step, however small the network.
        self.log_dict(metrics.compute(), prog_bar=metrics is not self.train_metrics, sync_dist=True)
        metrics.reset()

    def _parameter_groups(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if not self.no_decay:
            return trainable
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trainable if parameter.ndim > 1]},
            {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _run_length(self) -> RunLength:
        # Asked for only while optimizers are configured: that is when a multi-round callback presents one round.
        trainer = self.trainer
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "A learning-rate policy counts optimizer steps, but GradientAccumulationScheduler changes how many an "
                "epoch has. Use the Trainer's accumulate_grad_batches, or lr_policy=None."
            )
        total = trainer.estimated_stepping_batches
        if math.isinf(trainer.num_training_batches):
            # With max_steps and no max_epochs Lightning answers the line above without having looked at the loader.
            trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
        return RunLength(
            steps_per_epoch=None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches),
            total_steps=None if math.isinf(total) or total < 0 else int(total),
        )

    def _compile_network(self) -> None:
        if self.compiler in _COMPILE_MODES:
            self.network.compile(mode=self.compiler)
        elif self.compiler:
            self.network.compile(backend="inductor" if self.compiler is True else self.compiler)


def _accuracies(num_classes: int, top_k: tuple[int, ...]) -> MetricCollection:
    names = {k: "accuracy" if k == 1 else f"top{k}" for k in sorted({1, *top_k}) if k < num_classes}
    # Validation would read every label on the host, which stalls a GPU at each step; cross_entropy checks them anyway.
    return MetricCollection(
        {
            name: MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
            for k, name in names.items()
        },
        compute_groups=False,
    )
