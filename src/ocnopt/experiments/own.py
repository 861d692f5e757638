"""What a user brings along: an object of their own, named `module:name`."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ocnopt.experiments.errors import InputError

__all__ = ["find", "theirs", "told"]

#: Where code is not the user's: in libraries, in this package, and in what no file holds.
_NOT_THEIRS = (
    *(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]) + os.sep,
    "<",
)


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


@contextmanager
def theirs(what: str) -> Iterator[None]:
    """Turn what the user's own code raises inside into bad input.

    Args:
        what: Whose code it is, as the message says.

    Raises:
        InputError: It raised something; the message has its text and the place.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} raised {told(error)}") from error


def told(error: Exception) -> str:
    """An error in one line: its kind, its text and the place that a user would look at.

    Args:
        error: As it was caught.
    """
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError):  # its text has the place
        return line
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    place = (own or frames)[-1]
    return f"{line} ({Path(place.filename).name}, line {place.lineno})"
