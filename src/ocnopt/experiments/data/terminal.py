"""What a person at a terminal sees of a download."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ocnopt.experiments.data.describe import Download


class DownloadProgress:
    """Bars on stderr, one per file, silent where that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> DownloadProgress:
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bars down, also when a download fails."""
        self._progress.stop()

    def watch(self, download: Download) -> FileBar:
        """Return the bar of a file, at its beginning."""
        task = self._tasks.get(download.name)
        if task is None:
            task = self._progress.add_task(download.name, total=download.size)
            self._tasks[download.name] = task
        self._progress.reset(task)
        return FileBar(self._progress, task)


class FileBar:
    """One file's bar, as pooch moves it.

    Args:
        progress: The bars it is among.
        task: Which one it is.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._total = 0

    @property
    def total(self) -> int:
        """Bytes in all; 0 if the server does not say."""
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value
        if value:
            self._progress.update(self._task, total=value)

    def update(self, advance: int) -> None:
        """Move it by so many bytes."""
        self._progress.update(self._task, advance=advance)

    def reset(self) -> None:
        """Begin anew."""
        self._progress.reset(self._task)

    def close(self) -> None:
        """Be done; the bar stays at its end."""
