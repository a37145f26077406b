"""The narrow residual networks for 32x32 images: ResNet-20, -32, -56 and every other depth 6n + 2."""

import torch.nn.functional as F
from torch import Tensor, nn

_SHORTCUTS = ("A", "B", "none")


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of n basic blocks, mean pooling and a linear layer.

    The stages have `width`, 2 `width` and 4 `width` channels. Two and three halve the image at their first block, which
    is where the shortcut has to change shape: "A" takes every second pixel and fills the new channels with zeros (no
    parameters); "B" is a 1x1 convolution with BatchNorm. ResNet-20 for 10 classes has 269,722 parameters with A and
    272,474 with B. "none" leaves all shortcuts out, those within stages too: the paper's plain networks.

    Args:
        depth: layers with weights on the longest path, 6n + 2 with n at least 1.
        num_classes: number of logits, at least 2.
        shortcut: "A", "B" or "none", see above. The paper's CIFAR results use A; the lottery-ticket codes use B.
        in_channels: channels of the images.
        width: channels of the first stage, at least 1; 16 in the paper.

    Source: He et al., arXiv:1512.03385, section 4.2. Convolutions and the classifier are Kaiming-normal (fan-in, ReLU;
    He et al., arXiv:1502.01852), biases 0, BatchNorm scale 1 and shift 0.

    Differs: open_lth draws the BatchNorm scales from U(0, 1) and leaves the classifier's bias as torch draws it, so its
    tickets start elsewhere.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, *, shortcut: str = "B", in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet needs a depth of 6n + 2, such as 20, 32 or 56; got {depth}.")
        if num_classes < 2:
            raise ValueError(f"CifarResNet needs at least 2 classes; got num_classes={num_classes}.")
        if shortcut not in _SHORTCUTS:
            raise ValueError(
                "CifarResNet knows the shortcuts 'A' (no parameters), 'B' (1x1 convolution) and 'none'; got "
                f"{shortcut!r}."
            )
        if width < 1:
            raise ValueError(f"CifarResNet needs a width of at least 1 channel; got {width}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, num_classes), of images, shape (batch, in_channels, height, width)."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10, *, shortcut: str = "B", in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`CifarResNet` of depth 20."""
    return CifarResNet(20, num_classes, shortcut=shortcut, in_channels=in_channels, width=width)


def resnet32(num_classes: int = 10, *, shortcut: str = "B", in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`CifarResNet` of depth 32."""
    return CifarResNet(32, num_classes, shortcut=shortcut, in_channels=in_channels, width=width)


def resnet56(num_classes: int = 10, *, shortcut: str = "B", in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`CifarResNet` of depth 56."""
    return CifarResNet(56, num_classes, shortcut=shortcut, in_channels=in_channels, width=width)


def _stage(blocks: int, in_width: int, width: int, stride: int, shortcut: str) -> nn.Sequential:
    first = _Block(in_width, width, stride, shortcut)
    return nn.Sequential(first, *(_Block(width, width, 1, shortcut) for _ in range(blocks - 1)))


class _Block(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module | None
        if shortcut == "none":
            self.shortcut = None
        elif stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = _SubsampleAndPad(width - in_width, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        return F.relu(hidden if self.shortcut is None else hidden + self.shortcut(x))


class _SubsampleAndPad(nn.Module):
    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
