"""How a file that cannot be used is spoken of."""

from __future__ import annotations

from pathlib import Path

from ocnopt.experiments.errors import InputError


def damaged(path: Path, what: str) -> InputError:
    """Make the error that a damaged or mislabelled file ends in.

    Args:
        path: The file.
        what: What is wrong with it, to be read after its path.
    """
    return InputError(f"{path} {what}; delete it and fetch it again with ocnopt data get")
