"""The commands `ocnopt data ...`. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import importlib.util
import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocnopt.experiments.problems import SetName

if TYPE_CHECKING:
    from cyclopts import App

    from ocnopt.experiments.data.describe import DataSet


def data_app() -> App:
    """Return the commands, to be mounted in the program's own."""
    from cyclopts import App

    app = App(name="data", help="See what data sets there are, where they lie, and get them.")
    app.command(list_sets, name="list")
    app.command(get)
    app.command(where)
    return app


def list_sets(*, data_root: Path | None = None, json: bool = False) -> None:
    """List the data sets and say which are there.

    Args:
        data_root: Folder that holds the data [default: $OCNOPT_DATA, else a folder in the cache].
        json: Print one JSON object on stdout in place of the table.
    """
    from ocnopt.experiments.data.locate import data_folder
    from ocnopt.experiments.data.sets import all_sets

    top = data_folder(data_root)
    facts = [_facts(data_set, data_root) for data_set in all_sets().values()]
    if json:
        _print_json({"data_root": str(top), "sets": facts})
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("samples", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("classes", justify="right")
    table.add_column("size", justify="right")
    table.add_column("there", overflow="fold")
    for fact in facts:
        table.add_row(
            fact["name"],
            f"{fact['train']:,} + {fact['test']:,}",
            "x".join(map(str, fact["shape"])),
            str(fact["classes"] or "-"),
            _megabytes(fact["size"]),
            _there(fact),
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "\nsamples: training + test, a validation part counted as training; classes: none for a"
        f" density; size: of the download, if it is known; folders are looked for in {top}",
        soft_wrap=True,
    )


def get(*names: SetName, data_root: Path | None = None, json: bool = False) -> None:
    """Download data sets; what is there already is left as it is.

    Args:
        names: Which ones.
        data_root: Folder to put them under [default: $OCNOPT_DATA, else a folder in the cache].
        json: Print one JSON object on stdout in place of the lines.
    """
    from ocnopt.experiments.data.fetch import fetch
    from ocnopt.experiments.data.sets import all_sets
    from ocnopt.experiments.data.terminal import DownloadProgress
    from ocnopt.experiments.errors import InputError

    known = all_sets()
    if not names:
        raise InputError(f"say which data sets to get: {', '.join(known)}")
    done: list[dict[str, Any]] = []
    with DownloadProgress() as progress:
        for name in names:
            fetched = fetch(known[name], data_root, progress.watch)
            done.append({**_facts(known[name], data_root), "fetched": fetched})
    if json:
        _print_json({"sets": done})
        return
    for fact in done:
        if fact["folder"] is None:
            sys.stdout.write(f"{fact['name']}: nothing to fetch ({fact['layout']})\n")
        else:
            what = "fetched to" if fact["fetched"] else "already in"
            sys.stdout.write(f"{fact['name']}: {what} {fact['folder']}\n")


def where(name: SetName, /, *, data_root: Path | None = None, json: bool = False) -> None:
    """Print the folder of a data set; code 2 if it is not there.

    Args:
        name: Which one.
        data_root: Folder that holds the data [default: $OCNOPT_DATA, else a folder in the cache].
        json: Print one JSON object on stdout, with the paths of the files.
    """
    from ocnopt.experiments.data.locate import find_files
    from ocnopt.experiments.data.sets import all_sets

    data_set = all_sets()[name]
    files = find_files(data_set, data_root) if data_set.origin == "files" else []
    fact = _facts(data_set, data_root)
    if json:
        _print_json({**fact, "files": [str(path) for path in files]})
    else:
        sys.stdout.write(f"{fact['folder'] or fact['layout']}\n")


def _facts(data_set: DataSet, root: Path | None) -> dict[str, Any]:
    from ocnopt.experiments.data.locate import data_folder, missing_files

    missing = missing_files(data_set, root)
    files = data_set.origin == "files"
    return {
        "name": data_set.name,
        "title": data_set.title,
        "train": data_set.train,
        "test": data_set.test,
        "shape": list(data_set.shape),
        "classes": data_set.classes,
        "size": data_set.size,
        "origin": data_set.origin,
        "present": not missing if files else _can_be_made(data_set),
        "missing": missing,
        "folder": str(data_folder(root) / data_set.folder) if files else None,
        "layout": data_set.layout,
        "licence": data_set.licence,
        "citation": data_set.citation,
    }


def _can_be_made(data_set: DataSet) -> bool:
    return data_set.origin == "generated" or importlib.util.find_spec("sklearn") is not None


def _there(fact: dict[str, Any]) -> str:
    if not fact["present"]:
        return "no" if fact["origin"] == "files" else f"no: install {fact['origin']}"
    return "yes"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f} MB"


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json_format.dumps(value) + "\n")
