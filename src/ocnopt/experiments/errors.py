"""The one error that bad input to an experiment ends in."""

from __future__ import annotations

from ocnopt.errors import OcnoptError


class InputError(OcnoptError, ValueError):
    """A setting, file or folder that was given cannot be used.

    The message is one line for the person who gave it: what is wrong, where, and what to try. The
    command line prints it and exits with code 2.
    """
