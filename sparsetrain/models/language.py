"""One LightningModule for language models: a classifier of each next token, and its perplexity."""

from torch import Tensor

from sparsetrain.models.classifier import Batch, Classifier


class LanguageModel(Classifier):
    """Trains `network` to predict next tokens, and logs what `Classifier` does, each token counting as one example.

    A batch is (inputs, targets): token numbers, int64, both of shape (batch, time), the targets one token later. Losses
    are in nats a token. val/perplexity and test/perplexity are exp(loss), over all tokens of the split; log2 of it
    gives bits a token.

    Args:
        network: inputs -> logits of shape (batch, time, num_classes).
        num_classes: size of the vocabulary, at least 2.
        optimizer: see `Classifier`, as for the other arguments.
    """

    def predictions(self, batch: Batch) -> Batch:
        logits, targets = super().predictions(batch)
        return logits.flatten(0, 1), targets.flatten()

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies and val/perplexity."""
        super().on_validation_epoch_end()
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies and test/perplexity."""
        super().on_test_epoch_end()
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        # Of the loss that Lightning has averaged over batches and ranks: exp of a mean is not the mean of exps.
        loss: Tensor = self.trainer.callback_metrics[f"{stage}/loss"]
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True, sync_dist=True)
