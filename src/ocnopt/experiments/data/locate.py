"""Where the files of a data set are."""

from __future__ import annotations

import os
from pathlib import Path

from ocnopt.experiments.data.describe import DataSet
from ocnopt.experiments.errors import InputError

DATA_VARIABLE = "OCNOPT_DATA"


def data_folder(root: Path | None = None) -> Path:
    """Return the folder that holds one folder per data set.

    Args:
        root: The folder, if it was given.

    Returns:
        `root`, else the environment variable OCNOPT_DATA, else a folder `ocnopt` in the user's
        cache. It need not exist.

    Raises:
        InputError: If neither is given and pooch, which knows the cache, is not installed.
    """
    if root is not None:
        return root.expanduser()
    variable = os.environ.get(DATA_VARIABLE)
    if variable:
        return Path(variable).expanduser()
    try:
        import pooch
    except ImportError:
        raise InputError(
            f"say where the data are with --data-root FOLDER or {DATA_VARIABLE}; the folder that is"
            " taken otherwise needs pooch: pip install 'ocnopt[experiments]'"
        ) from None
    return Path(pooch.os_cache("ocnopt"))


def find_file(folder: Path, name: str) -> Path | None:
    """Return a file of a data set, a `.gz` also without that ending; None if there is none."""
    for path in (folder / name, folder / name.removesuffix(".gz")):
        if path.is_file():
            return path
    return None


def missing_files(data_set: DataSet, root: Path | None = None) -> list[str]:
    """Name the files of a data set that are not there; none for a set that has no files."""
    if data_set.origin != "files":
        return []
    folder = data_folder(root) / data_set.folder
    return [name for name in data_set.files if find_file(folder, name) is None]


def find_files(data_set: DataSet, root: Path | None = None) -> list[Path]:
    """Return the files of a data set.

    Args:
        data_set: One that is made of files.
        root: Folder that holds the set's folder; None as in `data_folder`.

    Returns:
        Their paths, in the order of `data_set.files`.

    Raises:
        InputError: If one is missing; it says how to get it.
    """
    top = data_folder(root)
    folder = top / data_set.folder
    missing = missing_files(data_set, root)
    if missing:
        where = f"file {folder / missing[0]}" if folder.is_dir() else f"folder {folder}"
        command = f"ocnopt data get {data_set.name}"
        if root is not None:
            command += f" --data-root {top}"
        how = f"get it with '{command}'" if data_set.downloads else data_set.by_hand
        raise InputError(
            f"{data_set.name} is not there (no {where}); {how}, or say with --data-root FOLDER or"
            f" {DATA_VARIABLE} which folder holds {data_set.folder}/"
        )
    return [path for name in data_set.files if (path := find_file(folder, name)) is not None]
