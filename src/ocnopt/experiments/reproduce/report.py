"""What an experiment is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ocnopt.experiments.watcher import Watcher

__all__ = ["Report", "Settings", "Watcher", "markdown_table"]


@dataclass(frozen=True)
class Settings:
    """How an experiment is to be run.

    Attributes:
        name: Its name, which its files bear.
        output: Folder for its files; exists.
        quick: Whether a small version will do, of less than a minute.
        seeds: Number of seeds; None for the version's own.
        data_root: Folder that holds mnist/ and fashion-mnist/; None takes the environment's.
        cache: Folder in which grids of runs keep their results; None keeps none.
        processes: Worker processes of a grid; None for one per core.
    """

    name: str
    output: Path
    quick: bool = False
    seeds: int | None = None
    data_root: Path | None = None
    cache: Path | None = None
    processes: int | None = None

    @property
    def picture(self) -> Path:
        """The PNG file that the experiment draws."""
        return self.output / f"{self.name}.png"

    @property
    def command(self) -> str:
        """The command line that repeats it."""
        words = ["ocnopt reproduce", self.name]
        if self.quick:
            words.append("--quick")
        if self.seeds is not None:
            words.append(f"--seeds {self.seeds}")
        return " ".join(words)


@dataclass(frozen=True)
class Report:
    """What an experiment came to.

    Attributes:
        columns: Headings of the short table.
        table: Its rows.
        sentence: What was seen.
        page: The whole of it, in Markdown.
        rows: What was measured, a mapping for each measurement.
        facts: What holds for all of them, settings above all.
    """

    columns: Sequence[str]
    table: Sequence[Sequence[str]]
    sentence: str
    page: str
    rows: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
