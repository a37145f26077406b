"""LeNet-300-100, the fully connected network of the lottery-ticket experiments."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """Three linear layers, 300-100-classes, with ReLU; 266,200 weights on 28x28 images of 10 classes.

    Weights are Glorot-normal and biases zero, as Frankle and Carbin initialise it.

    Args:
        input_shape: shape of one example, such as (1, 28, 28); only its product matters.
        num_classes: number of logits, at least 2.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", section III; the training
    setting is Frankle and Carbin, arXiv:1803.03635, figure 2.
    """

    def __init__(self, input_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(f"LeNet300100 needs a shape of positive sizes such as (1, 28, 28); got {input_shape!r}.")
        if num_classes < 2:
            raise ValueError(f"LeNet300100 needs at least 2 classes; got num_classes={num_classes}.")
        self.fc1 = nn.Linear(math.prod(self.input_shape), 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, num_classes), of images, shape (batch, *input_shape)."""
        if images.shape[1:] != self.input_shape:
            raise ValueError(
                f"LeNet300100 was made for examples of shape {self.input_shape}; this batch has "
                f"{tuple(images.shape[1:])}. Give that as `input_shape`."
            )
        hidden = F.relu(self.fc1(images.flatten(1)))
        hidden = F.relu(self.fc2(hidden))
        logits: Tensor = self.fc3(hidden)
        return logits
