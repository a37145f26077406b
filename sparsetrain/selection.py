"""Which parameters are pruned, and why the others are not."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

_FIRST, _LAST = "<first>", "<last>"
_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ATTENTION = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})


@dataclass(frozen=True)
class Selection:
    """Globs over parameter names, as `named_parameters` gives them.

    Maskable are the weights of linear and convolution layers and of attention projections, never biases, norms or
    tokens. Embeddings, weights tied to one, and depthwise convolutions are taken only if an include glob without a
    wildcard names them.

    Args:
        include: at least one must match.
        exclude: none may match; `first_and_last()` stands for the first and last maskable layer.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str):
                raise ValueError(f"{name}={globs!r} is one string where a list of globs is meant. Write [{globs!r}].")
            object.__setattr__(self, name, tuple(globs))

    def plan(self, module: nn.Module) -> tuple["PlanRow", ...]:
        """One row per parameter of `module`, in the order of `named_parameters`.

        Raises:
            ValueError: a glob that matches no parameter (with near names), nothing to prune, or a lazy layer.
        """
        kinds = {name: (tuple(parameter.shape), kind) for name, parameter, kind in _kinds(module)}
        self._check_globs(list(kinds))
        rows = {name: PlanRow(name, shape, *self._verdict(name, kind)) for name, (shape, kind) in kinds.items()}
        maskable = [name for name, (_, kind) in kinds.items() if self._is_maskable(name, kind)]
        for marker, ends in ((_FIRST, maskable[:1]), (_LAST, maskable[-1:])):
            if marker in self.exclude:
                for name in ends:
                    rows[name] = PlanRow(name, rows[name].shape, False, f"excluded: {marker.strip('<>')} layer")
        if not any(row.pruned for row in rows.values()):
            reasons = sorted({row.reason for row in rows.values()}) or ["it has no parameters"]
            raise ValueError(
                f"{type(module).__name__} has nothing to prune with {self}: {'; '.join(reasons)}. "
                "Name weights of linear or convolution layers in `include`."
            )
        return tuple(rows.values())

    def _verdict(self, name: str, kind: str) -> tuple[bool, str]:
        """Whether the parameter is pruned, and the reason that the plan prints."""
        for glob in self.exclude:
            if _matches(name, glob):
                return False, f"excluded by {glob!r}"
        if not any(_matches(name, glob) for glob in self.include):
            return False, "not included"
        if self._is_maskable(name, kind):
            return True, "pruned"
        return False, f"{kind}: name it in `include`" if kind in _ON_REQUEST else kind

    def _is_maskable(self, name: str, kind: str) -> bool:
        return kind == "weight" or (name in self.include and kind in _ON_REQUEST)

    def _check_globs(self, names: list[str]) -> None:
        for glob in (*self.include, *self.exclude) if names else ():
            if glob in (_FIRST, _LAST) or any(_matches(name, glob) for name in names):
                continue
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[:3]
            raise ValueError(f"{glob!r} matches no parameter. Near names: {', '.join(map(repr, near))}.")


def _matches(name: str, glob: str) -> bool:
    return name == glob or fnmatchcase(name, glob)  # names may hold brackets, as keys of a ModuleDict


@dataclass(frozen=True)
class PlanRow:
    """What happens to one parameter, and why."""

    name: str
    shape: tuple[int, ...]
    pruned: bool
    reason: str


def first_and_last() -> tuple[str, ...]:
    """For `exclude`: the first and the last maskable layer in the order of `named_parameters` (stem and classifier)."""
    return (_FIRST, _LAST)


_ON_REQUEST = frozenset({"embedding", "tied to an embedding", "depthwise convolution"})


def _kinds(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Each parameter once, under its first name, with what it is: "weight" if maskable, else the reason why not."""
    roles: dict[int, set[str]] = {}
    for owner in module.modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            roles.setdefault(id(parameter), set()).add(_role(owner, attribute))
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name!r} has no shape before its layer's first call. Call {type(module).__name__} with a batch "
                "before, or give the layer its number of inputs."
            )
        held = roles[id(parameter)]
        if "embedding" in held and "weight" in held:
            kind = "tied to an embedding"
        elif len(held) == 1 or "weight" not in held:
            kind = min(held)
        else:
            kind = "weight"
        yield name, parameter, kind


def _role(owner: nn.Module, attribute: str) -> str:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
        return "embedding"
    if isinstance(owner, nn.MultiheadAttention) and attribute in _ATTENTION:
        return "weight"
    if isinstance(owner, _WEIGHTED) and attribute == "weight":
        depthwise = getattr(owner, "groups", 1) > 1 and owner.groups == owner.in_channels
        return "depthwise convolution" if depthwise else "weight"
    if attribute.endswith("bias"):
        return "bias"
    return f"no maskable weight ({type(owner).__name__})"
