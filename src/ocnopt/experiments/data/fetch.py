"""Download data sets, so that what is there is whole or not there at all."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import Any, Protocol

from ocnopt.experiments.data.describe import DataSet, Download
from ocnopt.experiments.data.locate import (
    DATA_VARIABLE,
    data_folder,
    find_file,
    find_files,
    missing_files,
)
from ocnopt.experiments.data.unpack import unpack
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_atomically

ROUNDS = 2  # how often every mirror is asked
PAUSE = 2.0  # seconds between rounds
TIMEOUT = 30.0  # seconds without a byte, after which a mirror is given up
_CHUNK = 1 << 18


class Bar(Protocol):
    """What pooch moves while it downloads."""

    total: int

    def update(self, advance: int) -> None:
        """Move it by so many bytes."""

    def reset(self) -> None:
        """Begin anew."""

    def close(self) -> None:
        """Be done."""


Watch = Callable[[Download], Bar]


def fetch(data_set: DataSet, root: Path | None = None, watch: Watch | None = None) -> bool:
    """Download what a data set lacks.

    Every file is checked before it gets its name: against its checksum, or by what it holds where
    there is none. One that is there is left as it is, except that a set that comes in an archive is
    put in place as a whole: no two copies of it may mix.

    Args:
        data_set: The set.
        root: Folder to put it under; None as in `data_folder`.
        watch: Gives a bar for every attempt to download a file.

    Returns:
        Whether anything had to be downloaded; never for a set that has no files.

    Raises:
        InputError: If no mirror gave a file (it names them all, each with its reason, and says
            where to put the file by hand), an archive does not hold what it should, the folder
            cannot be written to, pooch is not installed, or the set is one that has to be brought.
    """
    if not missing_files(data_set, root):
        return False
    if not data_set.downloads:
        find_files(data_set, root)  # says what to do
    top = data_folder(root)
    try:
        top.mkdir(parents=True, exist_ok=True)
        # Beside the final place, so that a whole folder can be moved there in one step.
        with tempfile.TemporaryDirectory(prefix=f".{data_set.name}-", dir=top) as work:
            _fetch_into(data_set, top, Path(work), watch)
    except OSError as error:
        raise InputError(
            f"cannot write to {top} ({error.strerror or error}); give another folder with"
            f" --data-root FOLDER or {DATA_VARIABLE}"
        ) from None
    return True


def _fetch_into(data_set: DataSet, top: Path, work: Path, watch: Watch | None) -> None:
    folder = top / data_set.folder
    for download in data_set.downloads:
        if download.name not in data_set.files:  # an archive of them
            by_hand = top / download.name
            if by_hand.is_file():
                _check(by_hand, download)
                unpack(by_hand, data_set, work, folder)
            else:
                unpack(_download(download, by_hand, work, watch), data_set, work, folder)
        elif find_file(folder, download.name) is None:
            target = folder / download.name
            with _download(download, target, work, watch).open("rb") as file:
                folder.mkdir(exist_ok=True)
                write_atomically(target, partial(copyfileobj, file))


def _check(path: Path, download: Download) -> None:
    if download.checksum is None:
        return
    pooch = _pooch()
    kind, expected = download.checksum.split(":")
    found = pooch.file_hash(str(path), alg=kind)
    if found != expected:
        raise InputError(
            f"{path} does not match its checksum ({kind} {found}, not {expected}); delete it and"
            " fetch it again"
        )


def _download(download: Download, target: Path, work: Path, watch: Watch | None) -> Path:
    pooch = _pooch()
    reasons: dict[str, str] = {}
    mirrors = list(download.urls)
    for number in range(ROUNDS):
        if number and mirrors:
            time.sleep(PAUSE)
        for url in tuple(mirrors):
            downloader = pooch.HTTPDownloader(
                progressbar=False if watch is None else watch(download),
                chunk_size=_CHUNK,
                timeout=TIMEOUT,
                headers={"Accept-Encoding": "identity"},  # else a .gz may arrive unpacked
            )
            try:
                with _quiet(pooch):
                    found = pooch.retrieve(
                        url,
                        known_hash=download.checksum,
                        fname=download.name,
                        path=work,
                        downloader=downloader,
                    )
                return Path(found)
            except OSError as error:
                if error.errno is not None:  # the disk's; errors of the connection have none
                    raise
                reasons[url], passing = _reason(error)
                if not passing:
                    mirrors.remove(url)
            except ValueError:
                reasons[url] = "what it gives does not match the checksum"
                mirrors.remove(url)
    tried = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    which = f" with {download.checksum.replace(':', ' ')}" if download.checksum else ""
    raise InputError(
        f"{download.name} could not be fetched ({tried}); put a copy{which} at {target} and run the"
        " command again"
    )


def _reason(error: OSError) -> tuple[str, bool]:
    """Why a download failed, and whether it may go better next time."""
    response: Any = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason}", response.status_code >= 500
    deepest = re.findall(r"\[Errno -?\d+\] ([^'\")\]]+)", str(error))
    return deepest[-1] if deepest else type(error).__name__, True


@contextmanager
def _quiet(pooch: Any) -> Iterator[None]:
    """Keep pooch from writing lines between the bars."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def _pooch() -> Any:
    try:
        import pooch
    except ImportError:
        raise InputError("downloading needs pooch; pip install 'ocnopt[experiments]'") from None
    return pooch
