"""Image sets, whole on the device or decoded file by file, texts, and loaders that batch them exactly resumably."""

from sparsetrain.data.augment import Augmentation, Flip, Shift
from sparsetrain.data.cifar import CIFAR10, CIFAR100
from sparsetrain.data.digits import Digits
from sparsetrain.data.folder import FileLoader, ImageFolder
from sparsetrain.data.in_memory import InMemoryDataModule, Samples
from sparsetrain.data.loader import ImageLoader, InMemoryLoader, ResumableLoader
from sparsetrain.data.mnist import MNIST, FashionMNIST
from sparsetrain.data.synthetic import Synthetic
from sparsetrain.data.text import TextFile, TextLoader, TinyShakespeare

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Augmentation",
    "Digits",
    "FashionMNIST",
    "FileLoader",
    "Flip",
    "ImageFolder",
    "ImageLoader",
    "InMemoryDataModule",
    "InMemoryLoader",
    "ResumableLoader",
    "Samples",
    "Shift",
    "Synthetic",
    "TextFile",
    "TextLoader",
    "TinyShakespeare",
]
