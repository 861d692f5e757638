"""Who is told how a piece of work with many parts goes."""

from __future__ import annotations

__all__ = ["Part", "Watcher"]


class Watcher:
    """Told how an experiment goes; does nothing."""

    def start(self, total: int) -> None:
        """Called once, with the number of parts."""

    def advance(self, text: str = "") -> None:
        """Called after every part.

        Args:
            text: What it was.
        """


class Part(Watcher):
    """One of several grids that are watched as one: its own total is not told.

    Args:
        whole: Told of every part.
    """

    def __init__(self, whole: Watcher) -> None:
        self._whole = whole

    def advance(self, text: str = "") -> None:
        """Pass it on."""
        self._whole.advance(text)
