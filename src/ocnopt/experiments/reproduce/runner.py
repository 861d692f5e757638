"""Run an experiment by its name and write its folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import without_non_finite, write_atomically
from ocnopt.experiments.reproduce import EXPERIMENTS
from ocnopt.experiments.reproduce.report import Report, Settings, Watcher

__all__ = ["reproduce", "require_known"]


def require_known(name: str) -> None:
    """Refuse a name that no experiment has.

    Raises:
        InputError: As it says.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}")


def reproduce(settings: Settings, watcher: Watcher | None = None) -> Report:
    """Run an experiment and write NAME.md, .html, .json and .png, replacing older ones.

    The HTML file is the page with its picture inside: one file to open or to send.

    Every run is on one thread, so that its sums are the same wherever it runs. The caller's random
    state and thread setting are left as they were.

    Args:
        settings: What to do.
        watcher: Told how it goes.

    Returns:
        What came of it.

    Raises:
        InputError: The name, a setting, the data or the folder cannot be used.
    """
    require_known(settings.name)
    if settings.seeds is not None and settings.seeds < 1:
        raise InputError(f"seeds must be at least 1, not {settings.seeds}")
    for what, module in (("pictures", "matplotlib"), ("pages", "markdown_it")):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{what} need {module}; pip install 'ocnopt[experiments]'")
    from ocnopt.experiments.page import html_page

    experiment = EXPERIMENTS[settings.name]
    run: Callable[[Settings, Watcher], Report] = getattr(
        import_module(experiment.module), experiment.function
    )
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.output / ".writable", lambda file: None)
        (settings.output / ".writable").unlink()
        with _apart():
            report = run(settings, watcher or Watcher())
        page = report.page.rstrip() + "\n"
        texts = {
            "md": page,
            "html": html_page(page, settings.output),
            "json": _as_json(report),
        }
        for kind, text in texts.items():
            _write(settings.output / f"{settings.name}.{kind}", text)
    except OSError as error:
        raise InputError(f"cannot write to {settings.output}: {error.strerror or error}") from None
    return report


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _as_json(report: Report) -> str:
    """One object, with a line for each row."""
    head = json.dumps(without_non_finite({"seen": report.sentence, **report.facts}), indent=2)
    rows = ",\n".join("    " + json.dumps(without_non_finite(row)) for row in report.rows)
    return f'{head.removesuffix("}").rstrip()},\n  "rows": [\n{rows}\n  ]\n}}\n'


@contextmanager
def _apart() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
