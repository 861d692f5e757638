"""What a user brings along: an object of their own, named `module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ocnopt.experiments.errors import InputError

__all__ = ["find"]


def find(name: str, what: str) -> Any:
    """Import an object by its name.

    Modules in the working folder are found, too.

    Args:
        name: `package.module:name`.
        what: What it is for, as the message says.

    Raises:
        InputError: The module cannot be imported, or has no such name.
    """
    module, _, attribute = name.partition(":")
    if not module or module.startswith(".") or not attribute:
        raise InputError(f"{what} {name}: expected module:name")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} {name}: module {module!r} cannot be imported: {error}") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise InputError(f"{what} {name}: module {module!r} has no {attribute!r}") from None
    if not callable(found):
        raise InputError(f"{what} {name}: {attribute!r} cannot be called")
    return found
