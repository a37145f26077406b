"""The 8x8 digits that scikit-learn carries: a real task that needs no download."""

import torch

from sparsetrain.data.augment import Shift
from sparsetrain.data.in_memory import InMemoryDataModule, Samples
from sparsetrain.data.split import stratified_split

TEST_SIZE = 597


class Digits(InMemoryDataModule):
    """Handwritten digits, 8x8 grey (values 0 to 16): 1,000 train, 200 val, 597 test, stratified; standardised.

    Mean and deviation are those of the training images. Needs scikit-learn.

    Args:
        shift: largest random move of a training image in pixels; 0 for none.
        val_size: see `InMemoryDataModule`, as for the other arguments.

    Source: the test part of Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI.
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(
        self,
        *,
        shift: int = 1,
        val_size: int = 200,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            augment=(Shift(shift),) if shift else (),
            drop_last=drop_last,
            seed=seed,
        )

    def read(self) -> tuple[Samples, Samples]:
        """1,200 images for training and validation, 597 for the test."""
        from sklearn.datasets import load_digits  # heavy, and needed for this set only

        digits = load_digits()
        samples = Samples(torch.from_numpy(digits.images).byte()[:, None], torch.from_numpy(digits.target).long())
        rest, test = stratified_split(samples.labels, TEST_SIZE)
        return samples.take(rest), samples.take(test)
