"""Take a data set's files out of an archive."""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import IO

from ocnopt.experiments.data.describe import DataSet
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically

# What reading a broken archive ends in; the last two, of a zip that is encrypted or packed in a way
# that Python does not know.
_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile),
    *(NotImplementedError, RuntimeError),
)


def unpack(archive: Path, data_set: DataSet, work: Path, folder: Path) -> None:
    """Put the files of a set that are in a tar or zip archive where they belong.

    Only those are taken out, by name, as plain files: what else there is cannot be written
    anywhere. A folder that does not exist yet appears complete. Where the archive has no checksum,
    what the files hold is checked first.

    Args:
        archive: The archive, a zip if its name says so; it holds the files in the folder
            `data_set.inside`.
        data_set: What to take out.
        work: An empty folder on the same disk as `folder`.
        folder: Where the files belong.

    Raises:
        InputError: If the archive is damaged, lacks a file, has a member that points outside, or
            has no checksum and holds something else than was published.
        OSError: If the disk cannot be written to.
    """
    staged = work / "unpacked"
    staged.mkdir()
    members = _of_zip if archive.suffix == ".zip" else _of_tar
    try:
        for name, content in members(archive, data_set):
            with content:
                write_atomically(staged / name, partial(copyfileobj, content))
    except _BROKEN as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise _damaged(archive, f"cannot be unpacked ({reason})") from None
    for name in data_set.files:
        if not (staged / name).is_file():
            raise _damaged(archive, f"has no {_inside(data_set) / name}")
    if all(download.checksum is None for download in data_set.downloads):
        from ocnopt.experiments.data.series import check_published

        check_published(staged, data_set)
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        os.rename(staged, folder)
        return
    for name in data_set.files:
        os.replace(staged / name, folder / name)


def _of_tar(archive: Path, data_set: DataSet) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            name = _wanted(archive, member.name, member.isfile(), data_set)
            content = tar.extractfile(member) if name else None
            if content is not None:
                yield name, content


def _of_zip(archive: Path, data_set: DataSet) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            name = _wanted(archive, member.filename, not member.is_dir(), data_set)
            if name:
                yield name, packed.open(member)


def _wanted(archive: Path, member: str, is_file: bool, data_set: DataSet) -> str:
    """Name of the file that a member is, empty if it is none of the set's."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise _damaged(archive, f"has a member outside of it, {member}")
    inside = path.parent == _inside(data_set) and path.name in data_set.files
    if inside and not is_file:
        raise _damaged(archive, f"has {member} as something else than a file")
    return path.name if inside else ""


def _inside(data_set: DataSet) -> PurePosixPath:
    """Folder of the files in their archive."""
    return PurePosixPath(data_set.folder if data_set.inside is None else data_set.inside)


def _damaged(archive: Path, what: str) -> InputError:
    return InputError(f"{archive} {what}; it was not unpacked")
