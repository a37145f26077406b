"""The one place where a configuration becomes objects."""

from typing import Any

import hydra.utils


def instantiate(node: Any, **arguments: Any) -> Any:
    """The object that `node` describes, nested ones first; plain lists and dicts below it; None stays None.

    Every call of the application comes through here, so that what may be executed can be restricted in one place.

    Args:
        node: a configuration with `_target_`, or a collection of such.
        arguments: further arguments for the outermost `_target_`; they win over those of `node`.
    """
    return hydra.utils.instantiate(node, _convert_="all", **arguments)
