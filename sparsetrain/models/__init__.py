"""Networks, learning-rate policies and the LightningModule that trains a classifier."""

from sparsetrain.models.cifar_resnet import CifarResNet, resnet20, resnet32, resnet56
from sparsetrain.models.classifier import Classifier
from sparsetrain.models.lenet import LeNet300100
from sparsetrain.models.lr import ConstantLR, Cosine, LinearDecay, LRPolicy, MultiStep
from sparsetrain.models.timm import timm_model

__all__ = [
    "CifarResNet",
    "Classifier",
    "ConstantLR",
    "Cosine",
    "LRPolicy",
    "LeNet300100",
    "LinearDecay",
    "MultiStep",
    "resnet20",
    "resnet32",
    "resnet56",
    "timm_model",
]
