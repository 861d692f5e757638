"""Runs of an experiment with a loop of its own: spread over the cores, kept once they are done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from ocnopt.experiments.cache import code_digest
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.files import without_non_finite, write_json
from ocnopt.experiments.reproduce.report import Settings, Watcher

__all__ = ["kept_runs"]

Run = TypeVar("Run")
Result = dict[str, Any]


def kept_runs(
    settings: Settings,
    name: str,
    runs: Sequence[Run],
    data: Any,
    train: Callable[[Run, Any], Result],
    watcher: Watcher,
) -> list[tuple[Run, Result]]:
    """Train every run that is not in the cache.

    Args:
        settings: Those of the experiment: its cache and its number of processes.
        name: What the results are kept under, besides the run itself.
        runs: Frozen dataclasses of plain values.
        data: Given to every run.
        train: Importable; returns plain values that JSON can hold.
        watcher: Told of every run that is over.

    Returns:
        Every run with its result, in their order.

    Raises:
        InputError: joblib is missing, or the cache cannot be written to.
    """
    results: dict[int, Result] = {}
    missing = []
    for i, run in enumerate(runs):
        found = _read(_path(settings, name, run, data))
        if found is None:
            missing.append(i)
        else:
            results[i] = found
            watcher.advance(name)
    for i, result in _spread(settings, runs, missing, data, train):
        results[i] = result = without_non_finite(result)
        _write(_path(settings, name, runs[i], data), runs[i], result)
        watcher.advance(name)
    return [(run, results[i]) for i, run in enumerate(runs)]


def _spread(
    settings: Settings,
    runs: Sequence[Run],
    places: list[int],
    data: Any,
    train: Callable[[Run, Any], Result],
) -> Any:
    if settings.processes == 1 or len(places) < 2:
        return ((i, train(runs[i], data)) for i in places)
    try:
        from joblib import Parallel, delayed
    except ImportError:
        raise InputError("grids need joblib; pip install 'ocnopt[experiments]'") from None
    parallel = Parallel(
        n_jobs=settings.processes or -1, batch_size=1, return_as="generator_unordered"
    )
    return parallel(delayed(_alone)(i, runs[i], data, train) for i in places)


def _alone(
    place: int, run: Run, data: Any, train: Callable[[Run, Any], Result]
) -> tuple[int, Result]:
    torch.set_num_threads(1)
    return place, train(run, data)


def _path(settings: Settings, name: str, run: Any, data: Any) -> Path | None:
    if settings.cache is None:
        return None
    shapes = [list(part.shape) for part in vars(data).values() if isinstance(part, torch.Tensor)]
    facts = [name, asdict(run), shapes, torch.__version__, code_digest()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return settings.cache / key[:2] / f"{key[2:]}.json"


def _read(path: Path | None) -> Result | None:
    try:
        return None if path is None else dict(json.loads(path.read_text())["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path | None, run: Any, result: Result) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"run": asdict(run), "result": result})
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}") from None
