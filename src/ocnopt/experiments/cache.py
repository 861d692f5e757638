"""Results of runs, kept by what was computed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ocnopt
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import write_json
from ocnopt.experiments.machine import machine
from ocnopt.experiments.outcome import Outcome

__all__ = ["Cache", "code_digest", "key_of"]

#: Settings that do not change what a run comes to.
_WITHOUT_EFFECT = (
    *("data_root", "threads"),
    *("log_every", "checkpoint_every", "curve", "evaluate_every"),
)
#: Parts of the package that runs compute with.
_COMPUTING = (
    *("control", "curvature", "layers", "losses", "ode", "optim"),
    *("experiments/data", "experiments/flows", "experiments/networks"),
)
_COMPUTING_FILES = (
    *("datasets", "horizon", "optimizers", "order", "outcome", "setup", "split", "stopwatch"),
    *("together", "training"),
)


class Cache:
    """A folder of results, one small file per run.

    A result is found again by a digest of everything that decides it: the resolved configuration,
    the seed, torch's version, the code that computes, the sizes of the data's files, and the
    source of modules that a user brings along.

    Args:
        folder: Where the files are; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, config: TrainConfig) -> Outcome | None:
        """The result of a run, or None; damaged files count as none, and so do missing curves."""
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._path(self.folder, config).read_text())
            outcome = Outcome.from_json(kept["outcome"])
            curve, every = kept["config"]["curve"], kept["config"]["log_every"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if config.curve and (not curve or every != config.log_every) else outcome

    def open(self) -> None:
        """Make the folder, before anything is computed for it.

        Raises:
            InputError: It cannot be written to.
        """
        if self.folder is None:
            return
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()

    def put(self, config: TrainConfig, outcome: Outcome) -> None:
        """Keep a result.

        Raises:
            InputError: The folder cannot be written to.
        """
        if self.folder is None:
            return
        path = self._path(self.folder, config)
        with self._writing(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"config": config.to_json(), "outcome": outcome.to_json()})

    @staticmethod
    @contextlib.contextmanager
    def _writing(folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None

    def _path(self, folder: Path, config: TrainConfig) -> Path:
        key = key_of(config)
        return folder / key[:2] / f"{key[2:]}.json"


def key_of(config: TrainConfig) -> str:
    """The digest that a run is known by.

    Args:
        config: The run.
    """
    settings = config.resolved().to_json()
    for name in _WITHOUT_EFFECT:
        settings.pop(name)
    facts: dict[str, Any] = {
        "settings": settings,
        "torch": torch.__version__,
        "code": code_digest(),
        "data": _files(config),
        "own": [_source(n) for n in (config.dataset, config.network, config.optimizer) if ":" in n],
    }
    if config.evaluate_every is not None:
        # Times are those of one machine and so many threads; the others' are no answer.
        threads = config.resolved().threads
        facts["clock"] = [config.evaluate_every, threads, machine(config.device)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """The digest of all code that runs compute with."""
    root = Path(ocnopt.__file__).parent
    files = [file for part in _COMPUTING for file in (root / part).rglob("*.py")]
    files += [root / "experiments" / f"{name}.py" for name in _COMPUTING_FILES]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _files(config: TrainConfig) -> list[tuple[str, int]]:
    if ":" in config.dataset:
        return []
    return _file_sizes(config.dataset, config.data_root)


@functools.cache
def _file_sizes(dataset: str, root: Path | None) -> list[tuple[str, int]]:
    from ocnopt.experiments.data.locate import find_files
    from ocnopt.experiments.data.sets import SETS

    found = SETS[dataset]  # type: ignore[index]
    if found.origin != "files":
        return []
    return [(path.name, path.stat().st_size) for path in find_files(found, root)]


@functools.cache
def _source(name: str) -> str:
    module = name.partition(":")[0]
    if module.partition(".")[0] == "torch":
        return name
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return name  # importing it will say what is wrong
    digest = hashlib.sha256()
    for file in _files_beside(Path(spec.origin), module):
        digest.update(file.read_bytes())
    return f"{name} {digest.hexdigest()}"


def _files_beside(file: Path, module: str) -> list[Path]:
    """The source that a user's module may be made of: its folder's, or all of its package's.

    What is installed is taken for granted, but for the file itself.
    """
    if "site-packages" in file.parts:
        return [file]
    if "." not in module and file.name != "__init__.py":
        return sorted(file.parent.glob("*.py"))
    root = file.parents[module.count(".") - (file.name != "__init__.py")]
    return sorted(root.rglob("*.py"))
