"""All experiments, one after another, and a page that says what each of them showed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically
from ocnopt.experiments.page import html_page
from ocnopt.experiments.reproduce import EXPERIMENTS
from ocnopt.experiments.reproduce.report import Report, Settings, markdown_table

__all__ = ["index_page", "reproduce_all"]


def reproduce_all(
    settings: Settings, run: Callable[[Settings], Report], skipped: Callable[[str, str], None]
) -> None:
    """Run every experiment into one folder and write index.md and index.html there.

    Args:
        settings: How; the name does not count.
        run: Runs one experiment.
        skipped: Told of an experiment that could not be run, and why.

    Raises:
        InputError: At the end, where any could not be run; the others are there.
    """
    seen: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in EXPERIMENTS:
        try:
            seen[name] = run(replace(settings, name=name)).sentence
        except InputError as error:
            failed[name] = str(error)
            skipped(name, str(error))
    if seen:
        page = index_page(seen, failed)
        for kind, text in (("md", page), ("html", html_page(page, settings.output))):
            path = settings.output / f"index.{kind}"
            write_atomically(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    if failed:
        raise InputError(f"{', '.join(failed)} could not be run; see above")


def index_page(seen: dict[str, str], failed: dict[str, str]) -> str:
    """The list of experiments in Markdown.

    Args:
        seen: By name, what was seen.
        failed: By name, why it could not be run.
    """
    rows = [
        [f"[{name}]({name}.md)", EXPERIMENTS[name].shows, text[0].upper() + text[1:]]
        for name, text in seen.items()
    ]
    rows += [[name, EXPERIMENTS[name].shows, f"Not run: {why}"] for name, why in failed.items()]
    return "\n".join(
        [
            "# The papers' experiments, made anew",
            "",
            "Liu, Chen and Theodorou, *DDPNOpt: Differential Dynamic Programming Neural "
            "Optimizer*, ICLR 2021: every page has the paper's figure beside ours. The pages on "
            "residual and branching networks go with their *Dynamic Game Theoretic Neural "
            "Optimizer*, ICML 2021, and are ours alone; those on Neural ODEs with their "
            "*Second-order Neural ODE Optimizer*, NeurIPS 2021.",
            "",
            markdown_table(["", "what", "seen"], rows),
            "",
        ]
    )
