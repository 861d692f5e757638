"""Run a grid of configurations over the cores, and never the same one twice.

Runs that differ in their seed alone are trained together where that is faster. What has been
computed is found again in the cache; an interrupted grid goes on where it was. Processes are
joblib's: within ``joblib.parallel_config(backend="dask")`` (or "ray") the same call spreads over
the machines of a cluster, as results, not files, come back from the workers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.outcome import Outcome, make_outcome
from ocnopt.experiments.watcher import Watcher

__all__ = ["run_grid"]

#: Jobs per worker in a round, where a backend hands its results over all at once.
_ROUND = 4
#: Torch's random state and number of threads belong to the process: one run in it at a time.
_IN_PROCESS = threading.Lock()


@dataclass(frozen=True)
class _Job:
    """Runs that differ in their seed alone, and where their results go."""

    config: TrainConfig
    places: tuple[int, ...]
    seeds: tuple[int, ...]


_Results: TypeAlias = "Generator[tuple[_Job, list[Outcome]], None, None]"


def run_grid(
    configs: Sequence[TrainConfig],
    *,
    cache: Cache | None = None,
    processes: int | None = None,
    together: bool = True,
    watcher: Watcher | None = None,
) -> list[Outcome]:
    """Run every configuration.

    Args:
        configs: The runs; their output folders are not used. One that is given twice is run once.
        cache: Where results are looked up and kept.
        processes: Worker processes; None for one per core (or what an enclosing
            ``joblib.parallel_config`` says), 1 for none.
        together: Whether seeds may be trained together.
        watcher: Told how many runs there are and of each that is over.

    Returns:
        One outcome per configuration, in their order. Divergence is an outcome, not an error.

    Raises:
        InputError: A configuration, its data or the cache's folder cannot be used. What is done is
            in the cache.
    """
    from ocnopt.experiments.together import can_be_together

    cache = cache or Cache(None)
    cache.open()
    watcher = watcher or Watcher()
    watcher.start(len(configs))
    resolved = [replace(c.resolved(), output=None, resume=False) for c in configs]
    outcomes: list[Outcome | None] = [cache.get(config) for config in resolved]
    groups: dict[str, list[int]] = {}
    first: dict[str, int] = {}
    for place, (config, outcome) in enumerate(zip(resolved, outcomes, strict=True)):
        if outcome is not None:
            watcher.advance(_name(config))
            continue
        if first.setdefault(repr(config.to_json()), place) != place:
            continue
        grouped = together and can_be_together(config)
        same = repr(replace(config, seed=0).to_json()) if grouped else f"alone {place}"
        groups.setdefault(same, []).append(place)
    jobs = [
        _Job(resolved[places[0]], tuple(places), tuple(resolved[p].seed for p in places))
        for places in groups.values()
    ]
    with contextlib.closing(_spread(jobs, processes)) as done:
        for job, results in done:
            for place, outcome in zip(job.places, results, strict=True):
                cache.put(resolved[place], outcome)
                outcomes[place] = outcome
            for _ in results:
                watcher.advance(_name(job.config))
    for place, config in enumerate(resolved):
        if outcomes[place] is None:
            outcomes[place] = outcomes[first[repr(config.to_json())]]
            watcher.advance(_name(config))
    return [outcome for outcome in outcomes if outcome is not None]


def _spread(jobs: list[_Job], processes: int | None) -> _Results:
    """Run jobs in worker processes and hand each over as soon as it is done."""
    if processes == 1 or len(jobs) == 1:
        for job in jobs:  # threads of a grid that was interrupted may still be busy
            yield job, _run_numbered(0, job)[1]
        return
    if importlib.util.find_spec("joblib") is None:
        raise InputError("grids need joblib; pip install 'ocnopt[experiments]'")
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    backend, workers = get_active_backend()
    if processes is None and workers is None:  # nobody has said
        processes = -1
    options: dict[str, Any] = {"n_jobs": processes, "batch_size": 1}
    tasks = [delayed(_run_numbered)(i, _alone_on_its_core(job)) for i, job in enumerate(jobs)]
    if backend.supports_return_generator:
        rounds = [tasks]
        options["return_as"] = "generator_unordered"
    else:
        size = _ROUND * max(1, backend.effective_n_jobs(processes or workers))
        rounds = [tasks[i : i + size] for i in range(0, len(tasks), size)]
    for part in rounds:
        for i, outcomes in Parallel(**options)(part):
            yield jobs[i], outcomes


def _alone_on_its_core(job: _Job) -> _Job:
    """One thread per process: the processes share the cores among them."""
    return replace(job, config=replace(job.config, threads=job.config.threads or 1))


def _run_numbered(number: int, job: _Job) -> tuple[int, list[Outcome]]:
    with _IN_PROCESS:
        return number, _run(job)


def _run(job: _Job) -> list[Outcome]:
    from ocnopt.experiments.together import train_together

    if len(job.seeds) > 1:
        return train_together(job.config, job.seeds)
    return [_train_alone(job.config)]


def _train_alone(config: TrainConfig) -> Outcome:
    from ocnopt.experiments.training import train

    result = train(config)
    timed = config.evaluate_every is not None
    rows = [r for r in result.rows if r["test_accuracy"] is not None and not r.get("diverged")]
    return make_outcome(
        seed=config.seed,
        history=result.history,
        per_epoch=result.steps_per_epoch,
        diverged_step=result.diverged_step,
        accuracy=result.test_accuracy,
        seconds_per_step=result.seconds / max(result.steps, 1),
        accuracies=[(row["step"], row["test_accuracy"]) for row in rows],
        curve=config.curve or timed,
        clock=[(r["step"], r["cpu_seconds"], r["seconds"]) for r in rows] if timed else (),
    )


def _name(config: TrainConfig) -> str:
    return f"{config.dataset} {config.optimizer} lr {config.lr:g}"
