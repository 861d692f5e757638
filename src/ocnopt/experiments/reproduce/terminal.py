"""What a person at a terminal sees of an experiment."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.table import Table

from ocnopt.experiments.reproduce.report import Report, Settings, Watcher
from ocnopt.experiments.terminal import progress_bar

__all__ = ["ExperimentProgress", "print_report"]


class ExperimentProgress(Watcher):
    """A progress bar on stderr, silent where that is no terminal.

    Args:
        name: Text before the bar.
    """

    def __init__(self, name: str) -> None:
        self._progress = progress_bar()
        self._task = self._progress.add_task(name, total=None, shown="")

    def __enter__(self) -> ExperimentProgress:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar down, also when the experiment fails."""
        self._progress.stop()

    def start(self, total: int) -> None:
        """Set the bar's length."""
        self._progress.update(self._task, total=total)

    def advance(self, text: str = "") -> None:
        """Move the bar."""
        self._progress.update(self._task, advance=1, shown=text)


def print_report(console: Console, settings: Settings, report: Report) -> None:
    """Print the short table, the sentence and where the files are.

    Args:
        console: Where to.
        settings: How it was run.
        report: What it came to.
    """
    table = Table()
    for column in report.columns:
        table.add_column(column)
    for row in report.table:
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(report.sentence, highlight=False, markup=False)
    names = ", ".join(f"{settings.name}.{kind}" for kind in ("html", "md", "png", "json"))
    console.print(
        f"written: {names} in {settings.output}", highlight=False, markup=False, soft_wrap=True
    )
