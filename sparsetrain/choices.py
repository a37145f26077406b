"""Refusing what is none of the words that an argument may be."""

from collections.abc import Iterable


def check_choice(value: str, name: str, choices: Iterable[str]) -> None:
    """Raise if `value`, given as the argument `name`, is none of `choices`.

    Raises:
        ValueError: it is none; with all of them.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}.")
