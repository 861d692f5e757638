"""The folder that a comparison is written to."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ocnopt.experiments.compare.comparison import Comparison
from ocnopt.experiments.compare.page import markdown_page
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically, write_json

__all__ = ["require_folder", "save"]


def require_folder(folder: Path) -> None:
    """Make the folder and see that it can be written to, before hours of runs.

    Raises:
        InputError: It cannot, or what draws pictures and makes pages is not installed.
    """
    for what, module in (("pictures", "matplotlib"), ("pages", "markdown_it")):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{what} need {module}; pip install 'ocnopt[experiments]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", lambda file: None)
        (folder / ".writable").unlink()
    except OSError as error:
        raise _cannot_write(folder, error) from None


def save(comparison: Comparison, folder: Path) -> list[str]:
    """Write compare.html, .md and .json, sensitivity.png and curves.png, replacing older ones.

    Args:
        comparison: What to write.
        folder: Where to.

    Returns:
        The names of the files.

    Raises:
        InputError: The folder cannot be written to.
    """
    from ocnopt.experiments.compare.pictures import draw
    from ocnopt.experiments.page import html_page

    require_folder(folder)
    try:
        pictures = draw(comparison, folder)
        page = markdown_page(comparison, pictures)
        texts = {"compare.html": html_page(page, folder), "compare.md": page}
        for name, text in texts.items():
            _write(folder / name, text)
        write_json(folder / "compare.json", comparison.to_json())
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return [*texts, "compare.json", *pictures]


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {folder}: {error.strerror or error}; give another --output")
