"""Following the steps of whatever optimizers hold some parameters, as these come and go."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.callbacks.trainer import was_skipped
from sparsetrain.masks import Masks

Arguments = tuple[tuple[Any, ...], dict[str, Any]] | None  # what a hook before a step gives it in place of its own


class OptimizerFollower:
    """Follows the steps of the optimizers that hold parameters with a mask, until `detach`.

    Those of one of them are counted. Steps that a gradient scaler skips are none.

    Args:
        masks: bound to the module that is trained.
        optimizers: of the Trainer, in its order.
        what: the parameters are, for the error.
        on_step: called after each step of `counted`.

    Attributes:
        masks: as given.
        names: optimizer -> the parameters that it holds, of the optimizers that hold any.
        counted: the first of these, or of those that came in its place; its steps are the run's.

    Raises:
        ValueError: no optimizer holds such a parameter.
    """

    def __init__(
        self, masks: Masks, optimizers: Sequence[Optimizer], *, what: str, on_step: Callable[[], None]
    ) -> None:
        self.masks, self._on_step = masks, on_step
        self.names: dict[Optimizer, list[str]] = {}
        self._to_count = False  # hooks run twice in a step that calls that of the class above
        self._parameters: dict[Optimizer, list[int]] = {}
        self._handles: list[RemovableHandle] = []
        self.follow(optimizers)
        if not self.names:
            raise ValueError(f"No optimizer holds any of the {what}. Return one from configure_optimizers.")
        self.counted = next(iter(self.names))

    def before_step(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> bool:
        """Follow what has come into the optimizers since the last step.

        Args:
            optimizer: is about to step.
            optimizers: of the Trainer, which may have been replaced; `optimizer` may be another one.

        Returns:
            Whether there was anything new.
        """
        if optimizer not in optimizers:
            optimizers = [*optimizers, optimizer]
        is_new = self.counted not in optimizers or self._parameters.get(optimizer) != _identities(optimizer)
        if is_new:
            self.follow(optimizers)
            if self.counted not in self.names:
                self.counted = next(iter(self.names), self.counted)
            self._to_count = optimizer is self.counted  # whose step has begun
        return is_new

    def held(self, optimizer: Optimizer) -> list[str]:
        """The parameters that `optimizer` holds."""
        return self.names.get(optimizer, [])

    @property
    def followed(self) -> set[str]:
        """The parameters that any optimizer holds."""
        return {name for names in self.names.values() for name in names}

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow these optimizers, and no others."""
        self.detach()
        self._parameters, self.names = {}, {}
        for optimizer in optimizers:
            self._parameters[optimizer] = _identities(optimizer)
            held = set(self._parameters[optimizer])
            if names := [name for name in self.masks if id(self.masks.parameter(name)) in held]:
                self.names[optimizer] = names
                patch_step(optimizer)
                self._handles.append(optimizer.register_step_pre_hook(self.begins))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def begins(self, optimizer: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Arguments:
        """Called before each step; may give it other arguments."""
        self._to_count = self._to_count or optimizer is self.counted
        return None

    def moved(self, optimizer: Optimizer) -> None:
        """Called after each step of an optimizer, before it is counted."""

    def count(self) -> None:
        """Called after each step of `counted`."""
        self._on_step()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if was_skipped(optimizer):
            return
        self.moved(optimizer)
        if optimizer is self.counted and self._to_count:
            self._to_count = False
            self.count()


def patch_step(optimizer: Optimizer) -> None:
    """Let `step` call hooks also where the optimizer wraps another one without being made as one (timm's Lookahead)."""
    optimizer._patch_step_function()


def after_closure(arguments: tuple[Any, ...], settings: dict[str, Any], act: Callable[[], None]) -> Arguments:
    """Call `act` at the last moment before a step: in its hook or, if there is one, at the end of its closure.

    Returns:
        The arguments of the step, for its hook to return.
    """
    closure = settings.get("closure")
    if closure is None:
        act()
        return None

    def closed() -> Any:
        loss = closure()
        act()
        return loss

    return arguments, settings | {"closure": closed}


def _identities(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
