"""Types for the configuration, so that a typo or a wrong type fails when it is composed, before anything runs.

The schema of one of our own classes is derived from its constructor; a YAML takes it as `defaults: [base_<file name>]`.
Parts that are other people's classes (model, dataset, optimizer, trainer, loggers) are free-form.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsetrain.allocation import ERK, LAMP, Global, Uniform
from sparsetrain.callbacks import (
    BidirectionalWeightPruning,
    FixedMasks,
    GradualMagnitudePruning,
    IterativeMagnitudePruning,
    LotteryTicketRewinding,
    PolarizationGating,
    SparseModelSoup,
    StraightThroughNM,
)
from sparsetrain.criteria import Magnitude, Movement, Random, Saliency
from sparsetrain.models import ConstantLR, Cosine, LinearDecay, MultiStep
from sparsetrain.patterns import NM, Channel, TransposableNM, Unstructured
from sparsetrain.retrain import AdaptiveLR, CyclicLR, LastLR, LinearLR, ReplayLR, ScaledLR
from sparsetrain.schedules import Constant, Cubic, Linear, OneShot

SCHEMAS: Mapping[str, Mapping[str, type]] = {
    "method": {
        "gmp": GradualMagnitudePruning,
        "fixed_masks": FixedMasks,
        "imp": IterativeMagnitudePruning,
        "lottery": LotteryTicketRewinding,
        "soup": SparseModelSoup,
        "bdwp": BidirectionalWeightPruning,
        "straight_through": StraightThroughNM,
        "polarize": PolarizationGating,
    },
    "schedule": {"constant": Constant, "one_shot": OneShot, "linear": Linear, "cubic": Cubic},
    "criterion": {"magnitude": Magnitude, "random": Random, "saliency": Saliency, "movement": Movement},
    "allocation": {"global": Global, "uniform": Uniform, "erk": ERK, "lamp": LAMP},
    "pattern": {"unstructured": Unstructured, "channel": Channel, "nm": NM, "transposable_nm": TransposableNM},
    "retrain": {
        "replay": ReplayLR,
        "last": LastLR,
        "linear": LinearLR,
        "adaptive": AdaptiveLR,
        "cyclic": CyclicLR,
        "scaled": ScaledLR,
    },
    "lr_policy": {
        "constant": ConstantLR,
        "cosine": Cosine,
        "linear": LinearDecay,
        "multi_step": MultiStep,
        "multi_step_90ep": MultiStep,
    },
}
"""Config group -> file name -> the class that its `_target_` names."""


@dataclasses.dataclass
class Data:
    """Facts about the dataset, filled in by `train`."""

    num_classes: int | None = None
    input_shape: list[int] | None = None
    channels: int | None = None
    image_size: int | None = None


@dataclasses.dataclass
class Config:
    """The root of the configuration; what each entry means stands in conf/config.yaml."""

    name: str = MISSING
    seed: int = MISSING
    init_seed: int | None = MISSING
    init_from: str | None = MISSING
    ckpt_path: str | None = MISSING
    resume: bool = MISSING
    optimized_metric: str | None = MISSING
    matmul_precision: str = MISSING
    output_dir: str | None = MISSING
    data: Data = dataclasses.field(default_factory=Data)
    dataset: Any = MISSING
    model: Any = MISSING
    module: Any = MISSING
    optim: Any = MISSING
    lr_policy: Any = MISSING
    method: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: Any = MISSING


def register() -> None:
    """Make the schemas known to Hydra; to be called before a configuration is composed."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    for group, members in SCHEMAS.items():
        for name, target in members.items():
            store.store(group=group, name=f"base_{name}", node=schema(target))


def schema(target: Callable[..., Any], example: object = None) -> type:
    """A dataclass with `_target_` and the arguments of `target`: their names, types and defaults.

    An argument that is itself one frozen dataclass, such as `Pruning`, becomes a nested schema. One of a kind that has
    several classes (an abstract base) is free-form and has no default, which the arguments of another class would be
    merged with; one of a type that OmegaConf does not know is free-form, too.

    Args:
        target: a class or a function, with annotations.
        example: an object of that class whose values are the defaults, instead of those of the constructor.
    """
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    fields: list[tuple[str, Any, Any]] = [("_target_", str, _path(target))]
    for name, parameter in inspect.signature(target).parameters.items():
        default = parameter.default if example is None else getattr(example, name)
        fields.append((name, *_field(hints.get(name, Any), default)))
    return dataclasses.make_dataclass(target.__name__, fields)


def _field(hint: Any, default: Any) -> tuple[Any, Any]:
    """The type and the default of one field."""
    missing = default is inspect.Parameter.empty or inspect.isabstract(hint)  # a config group gives it
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint) and not inspect.isabstract(hint):
        nested = schema(hint, None if missing else default)
        return nested, dataclasses.field(default_factory=nested)
    if inspect.isabstract(hint) or not _is_known(hint):
        hint = Any
    value = MISSING if missing else _plain(default)
    return hint, dataclasses.field(default_factory=lambda: copy.copy(value))


def _is_known(hint: Any) -> bool:
    try:
        OmegaConf.structured(dataclasses.make_dataclass("Probe", [("field", hint, MISSING)]))
    except OmegaConfBaseException:
        return False
    return True


def _plain(value: Any) -> Any:
    """A default as the configuration writes it: lists for tuples."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _path(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"
