"""Lengths of training in one notation: "3ep" (epochs), "500it" or 500 (optimizer steps), "0.5run" (part of it)."""

import math
import re
from dataclasses import dataclass

_LENGTH = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>it|ep|run)")


@dataclass(frozen=True)
class RunLength:
    """How long a run is, known once its loaders and Trainer are.

    Args:
        steps_per_epoch: optimizer steps in an epoch (after gradient accumulation), at least 1; None if it is not known.
        total_steps: optimizer steps in the whole run, at least 1; None if the run has no fixed end.
    """

    steps_per_epoch: int | None
    total_steps: int | None


def parse_steps(length: int | str, run: RunLength) -> int:
    """The number of optimizer steps that `length` stands for in `run`.

    Args:
        length: an int or "500it" (optimizer steps), "3ep" or "1.5ep" (epochs), "0.5run" (a share of the
            run, in [0, 1]). Fractions are rounded half up.
        run: the run's length.

    Returns:
        Steps, at least 0.

    Raises:
        ValueError: another notation, a share above 1, or a unit that this run cannot resolve.

    >>> run = RunLength(steps_per_epoch=100, total_steps=1000)
    >>> parse_steps("2ep", run), parse_steps("0.25run", run), parse_steps(7, run)
    (200, 250, 7)
    """
    number, unit = split_length(length)
    if unit == "it":
        return int(number)
    if unit == "ep":
        if run.steps_per_epoch is None:
            raise ValueError(
                f"{length!r} counts epochs, but how many optimizer steps an epoch has is not known (a loader without a "
                "length, or a changing accumulate_grad_batches). Give steps instead, such as '500it'."
            )
        return math.floor(number * run.steps_per_epoch + 0.5)
    if run.total_steps is None:
        raise ValueError(
            f"{length!r} is a share of the run, but the run has no fixed end. Set max_epochs or max_steps (with "
            "several optimizers only max_epochs tells it), or give steps such as '500it'."
        )
    return math.floor(number * run.total_steps + 0.5)


def check_steps(length: int | str, name: str) -> None:
    """Raise at construction if `length` is no valid notation, so that a typo does not wait for the first step.

    Raises:
        ValueError: not a length; the message begins with `name`.
    """
    try:
        split_length(length)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def split_length(length: int | str) -> tuple[float, str]:
    """The number of a length and its unit, "it", "ep" or "run".

    Raises:
        ValueError: another notation, or a share above 1.
    """
    if isinstance(length, int) and not isinstance(length, bool):
        length = f"{length}it"
    match = _LENGTH.fullmatch(length.strip()) if isinstance(length, str) else None
    if match is None:
        raise ValueError(
            f"{length!r} is no length. Write '3ep', '500it', '0.5run' or a whole number of steps, at least 0."
        )
    number, unit = float(match["number"]), match["unit"]
    if unit == "it" and number != int(number):
        raise ValueError(f"{length!r} is not a whole number of steps. Write '{math.floor(number + 0.5)}it'.")
    if unit == "run" and number > 1:
        raise ValueError(f"{length!r} is more than the run. A share lies in [0, 1]; '1run' is all of it.")
    return number, unit
