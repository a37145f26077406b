"""Networks, learning-rate policies and the LightningModules that train classifiers and language models."""

from sparsetrain.models.cifar_resnet import CifarResNet, resnet20, resnet32, resnet56
from sparsetrain.models.classifier import Classifier
from sparsetrain.models.gpt import GPT
from sparsetrain.models.language import LanguageModel
from sparsetrain.models.lenet import LeNet300100
from sparsetrain.models.lr import ConstantLR, Cosine, LinearDecay, LRPolicy, MultiStep
from sparsetrain.models.timm import timm_model

__all__ = [
    "GPT",
    "CifarResNet",
    "Classifier",
    "ConstantLR",
    "Cosine",
    "LRPolicy",
    "LanguageModel",
    "LeNet300100",
    "LinearDecay",
    "MultiStep",
    "resnet20",
    "resnet32",
    "resnet56",
    "timm_model",
]
