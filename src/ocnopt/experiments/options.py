"""Read `key=value` options as they stand on the command line; imports nothing heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args

from ocnopt.experiments.errors import InputError

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """Read options such as `momentum=0.9`, `bellman=share` or `betas=(0.9, 0.99)`.

    A value is read as a Python literal. What is not one is text, so that names need no quotes;
    true, false and none are understood in any case.

    Args:
        items: Texts of the form `key=value`.

    Returns:
        The values by name, in the order given.

    Raises:
        InputError: If an item has no `=`, no name, or a name that was given before.
    """
    options: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise InputError(f"option {item!r} is not of the form key=value, as in momentum=0.9")
        if name in options:
            raise InputError(f"option {name} is given twice; give it once")
        options[name] = _value(text.strip())
    return options


def parse_widths(text: str) -> tuple[int, ...]:
    """Read hidden widths such as `32,32,16`.

    Raises:
        InputError: If a part is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"widths {text!r} are not whole numbers with commas, as in 32,32,16"
        ) from None


def require_whole(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse fractions where an option is a whole number; cyclopts would round them.

    Args:
        app: The command; this and the next are there as cyclopts calls it so.
        commands: Its name.
        arguments: What was given, as texts.

    Raises:
        InputError: An option has a fraction.
    """
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                if _is_fraction(token.value):
                    raise InputError(f"{argument.name} must be a whole number, not {token.value}")


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # no number at all, which is said elsewhere
        return False


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
