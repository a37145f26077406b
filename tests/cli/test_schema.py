from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigAttributeError, ValidationError

from sparsetrain.allocation import Global
from sparsetrain.callbacks import GradualMagnitudePruning
from sparsetrain.cli.instantiate import instantiate
from sparsetrain.cli.schema import SCHEMAS, schema
from sparsetrain.criteria import Magnitude
from sparsetrain.masks import Pruning
from sparsetrain.patterns import Unstructured
from sparsetrain.schedules import Cubic


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True)
class Square(Shape):
    side: float = 2.0

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class Names:
    include: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Thing:
    length: int | str
    names: Names = Names(("a", "b"))
    shape: Shape = Square(3.0)
    other: object = None


def test_a_schema_has_the_arguments_defaults_and_types_of_its_class() -> None:
    node = OmegaConf.structured(schema(Thing))
    assert OmegaConf.to_container(node) == {
        "_target_": f"{__name__}.Thing",
        "length": MISSING,
        "names": {"_target_": f"{__name__}.Names", "include": ["a", "b"]},
        "shape": MISSING,
        "other": None,
    }
    for value in (3, "3ep"):
        node.length = value
    with pytest.raises(ValidationError):
        node.length = [3]
    with pytest.raises(ConfigAttributeError):
        node.names.exclude = ["c"]


def test_one_of_several_classes_has_only_arguments_of_its_own() -> None:
    node = OmegaConf.merge(schema(Thing), {"shape": {"_target_": "elsewhere.Circle", "radius": 1.0}})
    assert OmegaConf.to_container(node.shape) == {"_target_": "elsewhere.Circle", "radius": 1.0}


def test_two_nodes_of_one_schema_share_nothing() -> None:
    first, second = OmegaConf.structured(schema(Thing)), OmegaConf.structured(schema(Thing))
    first.names.include.append("c")
    assert second.names.include == ["a", "b"]


def test_the_defaults_of_a_schema_make_the_defaults_of_the_class() -> None:
    node = OmegaConf.structured(schema(GradualMagnitudePruning))
    node.schedule = OmegaConf.structured(schema(Cubic))
    node.schedule.merge_with({"final": 0.9, "begin": 0, "end": "1run"})
    for name, default in (("criterion", Magnitude), ("allocation", Global), ("pattern", Unstructured)):
        node.pruning[name] = OmegaConf.structured(schema(default))
    made = instantiate(node)
    assert made.pruning == Pruning()
    assert made.schedule == Cubic(0.9, begin=0, end="1run")


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, members in SCHEMAS.items() for name in members])
def test_every_class_of_ours_has_a_schema(group: str, name: str) -> None:
    OmegaConf.structured(schema(SCHEMAS[group][name]))
