"""Take a data set's files out of an archive."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from functools import partial
from pathlib import Path, PurePosixPath
from shutil import copyfileobj

from ocnopt.experiments.data.sets import DataSet
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically


def unpack(archive: Path, data_set: DataSet, work: Path, folder: Path) -> None:
    """Put the files of a set that are in a tar archive where they belong.

    Only those are taken out, by name, as plain files: what else there is cannot be written
    anywhere. A folder that does not exist yet appears complete.

    Args:
        archive: The archive; it holds the files in a folder of the set's name for it.
        data_set: What to take out.
        work: An empty folder on the same disk as `folder`.
        folder: Where the files belong.

    Raises:
        InputError: If the archive is damaged, lacks a file, or has a member that points outside.
        OSError: If the disk cannot be written to.
    """
    staged = work / "unpacked"
    staged.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = _wanted(archive, member, data_set)
                content = tar.extractfile(member) if name else None
                if content is not None:
                    with content:
                        write_atomically(staged / name, partial(copyfileobj, content))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise _damaged(archive, f"cannot be unpacked ({reason})") from None
    for name in data_set.files:
        if not (staged / name).is_file():
            raise _damaged(archive, f"has no {data_set.folder}/{name}")
    if not folder.exists():
        os.rename(staged, folder)
        return
    for name in data_set.files:
        os.replace(staged / name, folder / name)


def _wanted(archive: Path, member: tarfile.TarInfo, data_set: DataSet) -> str:
    """Name of the file that a member is, empty if it is none of the set's."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise _damaged(archive, f"has a member outside of it, {member.name}")
    inside = path.parent == PurePosixPath(data_set.folder) and path.name in data_set.files
    if inside and not member.isfile():
        raise _damaged(archive, f"has {member.name} as something else than a file")
    return path.name if inside else ""


def _damaged(archive: Path, what: str) -> InputError:
    return InputError(f"{archive} {what}; it was not unpacked")
