"""Write files so that a reader sees the old content or the new, never half of one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its final place, then move it there in one step.

    Args:
        path: The file; an existing one is replaced only once the new one is complete on disk.
        write: Called with a binary file open for writing.

    Raises:
        OSError: If the folder cannot be written to. What `write` raises passes through; both leave
            the old file as it was and nothing beside it.
    """
    part = path.with_name(f".{path.name}.part")  # always the same: what a crash left is replaced
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a readable JSON file, atomically."""
    text = json.dumps(without_non_finite(value), indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def without_non_finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None; keep the rest."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return value
