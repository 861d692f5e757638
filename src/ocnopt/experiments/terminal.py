"""What a person at a terminal sees of a run."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

from ocnopt.experiments.training import TrainResult, Watcher

_SECONDS_BETWEEN_UPDATES = 0.1


def progress_bar() -> Progress:
    """Make a progress bar on stderr, silent where stderr is no terminal.

    Every task needs a field `shown`, the text after its bar.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        disable=not console.is_terminal,
    )


class TrainProgress(Watcher):
    """A progress bar with the loss, the last test accuracy and the time left.

    Args:
        progress: The bars to show this one among; None for one of its own.
        description: Text before the bar.
    """

    def __init__(self, progress: Progress | None = None, description: str = "training") -> None:
        """Make the bar; it shows once entered."""
        self._own = progress is None
        self._progress = progress_bar() if progress is None else progress
        self._task = self._progress.add_task(description, total=None, shown="")
        self._shown_at = 0.0
        self._loss = ""
        self._accuracy = ""

    def __enter__(self) -> TrainProgress:
        """Show the bar."""
        if self._own:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar down, also when the run fails."""
        if self._own:
            self._progress.stop()

    def start(self, step: int, total: int) -> None:
        """Set the bar's length."""
        self._progress.update(self._task, completed=step, total=total)

    def stepped(self, step: int, loss: Tensor) -> None:
        """Move the bar, a few times a second: reading the loss waits for the device."""
        now = time.monotonic()
        if now - self._shown_at < _SECONDS_BETWEEN_UPDATES or self._progress.disable:
            return
        self._shown_at = now
        self._loss = f"loss {float(loss.detach()):.4g}"
        self._show(step)

    def logged(self, row: dict[str, Any]) -> None:
        """Show a row's mean loss and accuracy."""
        if row["train_loss"] is not None:
            self._loss = f"loss {row['train_loss']:.4g}"
        if row["test_accuracy"] is not None:
            self._accuracy = f"  test {100 * row['test_accuracy']:.1f} %"
        self._show(row["step"])

    def _show(self, step: int) -> None:
        shown = self._loss + self._accuracy
        self._progress.update(self._task, completed=step, shown=shown)


def print_result(console: Console, result: TrainResult) -> None:
    """Print what a run came to.

    Args:
        console: Where to.
        result: The run.
    """
    config = result.config
    network: str = config.network
    if config.widths is not None:
        network += f" {'-'.join(map(str, config.widths))}"
    if config.activation is not None:
        network += f" {config.activation}"
    if config.norm not in (None, "none"):
        network += f" {config.norm} normalization"
    options = "".join(f" {name}={value}" for name, value in config.options.items())
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("data", f"{config.dataset}, batches of {config.batch_size}")
    table.add_row("network", f"{network}, {result.parameters:,} parameters")
    table.add_row("optimizer", f"{config.optimizer}, learning rate {config.lr:g}{options}")
    table.add_row(
        "trained",
        f"{result.steps:,} steps ({result.steps / result.steps_per_epoch:.2f} epochs) in"
        f" {result.seconds:.1f} s",
    )
    if result.diverged_step is not None:
        table.add_row("diverged", f"at step {result.diverged_step:,}; try a smaller --lr")
    else:
        last = min(result.steps, result.steps_per_epoch)
        table.add_row("train loss", f"{result.train_loss:.4g} (mean of the last {last:,} steps)")
    table.add_row("test accuracy", f"{100 * result.test_accuracy:.2f} %")
    if result.diagnostics is not None:
        table.add_row("last step", _diagnostics(result.diagnostics))
    if config.output is None:
        table.add_row("written", "nothing; --output FOLDER keeps metrics, checkpoint and plot")
    else:
        table.add_row("written", str(config.output))
    console.print(table, highlight=False, soft_wrap=False)


def _diagnostics(totals: dict[str, Any]) -> str:
    def shown(key: str, scale: float, form: str, unit: str) -> str | None:
        value = totals.get(key)
        return None if value is None else f"{key.replace('_', ' ')} {scale * value:{form}}{unit}"

    parts = (
        shown("predicted_decrease", 1.0, ".4g", ""),
        shown("actual_decrease", 1.0, ".4g", ""),
        shown("feedback_share", 100.0, ".1f", " %"),
        shown("clipped_share", 100.0, ".1f", " %"),
    )
    return ", ".join(part for part in parts if part is not None) or "no diagnostics"
