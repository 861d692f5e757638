"""The folder that a game is written to."""

from __future__ import annotations

from pathlib import Path

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_json
from ocnopt.experiments.inspection.look import Inspection

__all__ = ["save"]


def save(seen: Inspection, folder: Path) -> list[str]:
    """Write game.png and game.json, replacing older ones.

    Args:
        seen: What to write.
        folder: Where to.

    Returns:
        The names of the files.

    Raises:
        InputError: The folder cannot be written to, or pictures cannot be drawn.
    """
    try:
        from ocnopt.experiments.figures.game import save_game
    except ImportError:
        raise InputError("pictures need matplotlib; pip install 'ocnopt[experiments]'") from None
    title = f"{seen.network} on {seen.dataset}"
    if seen.game.alignments > 1:
        title += f", alignment {seen.alignment} of 0 to {seen.game.alignments - 1}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_game(folder / "game.png", seen.game, seen.alignment, title)
        write_json(folder / "game.json", seen.to_json())
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; give another --output"
        ) from None
    return ["game.png", "game.json"]
