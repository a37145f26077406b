"""Image sets that live whole on the device, and the loader that batches them exactly resumably."""

from sparsetrain.data.augment import Augmentation, Flip, Shift
from sparsetrain.data.cifar import CIFAR10, CIFAR100
from sparsetrain.data.digits import Digits
from sparsetrain.data.in_memory import InMemoryDataModule, Samples
from sparsetrain.data.loader import InMemoryLoader
from sparsetrain.data.mnist import MNIST, FashionMNIST
from sparsetrain.data.synthetic import Synthetic

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Augmentation",
    "Digits",
    "FashionMNIST",
    "Flip",
    "InMemoryDataModule",
    "InMemoryLoader",
    "Samples",
    "Shift",
    "Synthetic",
]
