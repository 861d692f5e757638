"""How a data set is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Origin = Literal["files", "scikit-learn", "generated"]


@dataclass(frozen=True)
class Download:
    """A file as its publisher gives it out.

    Attributes:
        name: Name of the file.
        urls: Where it can be had, tried in this order.
        checksum: What its bytes must come to, as `md5:...`; None where the publisher states none,
            and what comes is checked by what it holds (`DataSet.published`).
        size: Its bytes, as far as they are known.
    """

    name: str
    urls: tuple[str, ...]
    checksum: str | None
    size: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set and where it comes from.

    Attributes:
        name: Its name on the command line.
        title: What it shows, in a few words.
        train: Number of training samples; those that a set keeps for validation are among them.
        test: Number of test samples.
        shape: Shape of one input.
        classes: Number of classes; 0 for samples of a density.
        layout: How it is laid out, in a line.
        licence: What its publishers say of its use.
        citation: Whom to cite.
        origin: `files`, or what it is made by without any.
        folder: Folder of its files under the data folder.
        files: Files that have to be there, in the order in which they are read.
        downloads: What they are made from: the files themselves, or one archive. None where they
            cannot be fetched.
        by_hand: Without downloads, what to do for them to be there.
        inside: Folder of the files in their archive; None if it is called as `folder` is.
        published: Samples that each of `files` holds as it is published.
    """

    name: str
    title: str
    train: int
    test: int
    shape: tuple[int, ...]
    classes: int
    layout: str
    licence: str
    citation: str
    origin: Origin = "files"
    folder: str = ""
    files: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    by_hand: str = ""
    inside: str | None = None
    published: tuple[int, ...] = ()

    @property
    def size(self) -> int | None:
        """Bytes to download; None if there are none or they are not known."""
        sizes = [download.size for download in self.downloads]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None
