"""The settings of one training run; imports nothing heavy, so that the command line starts fast."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import (
    LEARNING_RATES,
    PROBLEMS,
    Activation,
    DatasetName,
    NetworkName,
    OptimizerName,
)

DEFAULT_EPOCHS = 10

# Settings that say where, for how long and how watchfully a run goes, not what it computes: these
# may differ when a run is resumed.
_FREE_ON_RESUME = frozenset(
    {"epochs", "steps", "output", "resume", "data_root", "device", "threads"}
    | {"log_every", "checkpoint_every"}
)
# Settings that say how a command was called; they are not kept with the run.
_NOT_KEPT = frozenset({"output", "resume"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. None means the default of the data set or optimizer.

    Attributes:
        dataset: Data set to train on.
        network: Network recipe, `fcn` or `cnn`.
        optimizer: Optimizer by its command-line name.
        lr: Learning rate, positive.
        options: Keyword options of the optimizer's class.
        widths: Hidden widths of `fcn`.
        activation: Non-linearity of `fcn`.
        batch_size: Samples per step; an epoch's last incomplete batch is dropped.
        epochs: Passes over the training set.
        steps: Optimizer steps. The run ends at whichever of `epochs` and `steps` comes first.
        seed: Seed of the initial weights and of the data order.
        output: Folder that the run is written to; None writes nothing.
        resume: Take up the run in `output` from its checkpoint.
        data_root: Folder with the data sets that are files.
        device: Torch device.
        threads: Threads that torch may use. None: one for `fcn`, whose products are too small to
            be shared and suffer badly where cores are busy; torch's own setting for `cnn`.
        log_every: Steps from one logged row to the next; epoch ends are logged too.
        checkpoint_every: Steps from one checkpoint to the next; epoch ends are kept too.

    Raises:
        InputError: If a value is out of its range, or two do not go together.
    """

    dataset: DatasetName = "digits"
    network: NetworkName = "fcn"
    optimizer: OptimizerName = "ddpnopt"
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] | None = None
    activation: Activation | None = None
    batch_size: int | None = None
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    output: Path | None = None
    resume: bool = False
    data_root: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    log_every: int = 50
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Check every value, so that a bad one fails here and not in the middle of a run."""
        for name, kind in (
            ("dataset", DatasetName),
            ("network", NetworkName),
            ("optimizer", OptimizerName),
            ("activation", Activation),
        ):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices and not (name == "activation" and value is None):
                raise InputError(f"{name} {value!r} is not known; choose from {', '.join(choices)}")
        for name in ("batch_size", "epochs", "steps", "threads", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise InputError(f"{flag} must be at least 1, not {value}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be a positive number, not {self.lr}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and {2**32 - 1}, not {self.seed}")
        if self.widths is not None and (not self.widths or min(self.widths) < 1):
            raise InputError(f"widths must be one or more positive numbers, not {self.widths}")
        if self.network == "cnn":
            if self.dataset == "wine":
                raise InputError("network cnn needs images and wine has none; use --network fcn")
            if self.widths is not None or self.activation is not None:
                raise InputError("widths and activation belong to --network fcn; cnn has neither")
        if self.resume and self.output is None:
            raise InputError("resume needs the run's folder; give it with --output")

    def resolved(self) -> TrainConfig:
        """Return the same run with every default filled in."""
        problem = PROBLEMS[self.dataset]
        fcn = self.network == "fcn"
        no_end = self.epochs is None and self.steps is None
        return replace(
            self,
            lr=LEARNING_RATES[self.optimizer] if self.lr is None else self.lr,
            options=dict(self.options),
            widths=(self.widths or problem.widths) if fcn else None,
            activation=(self.activation or problem.activation) if fcn else None,
            batch_size=self.batch_size or problem.batch_size,
            epochs=DEFAULT_EPOCHS if no_end else self.epochs,
            threads=1 if fcn and self.threads is None else self.threads,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what config.json and the checkpoint keep, as plain JSON values.

        An option that is not a plain value, such as a preconditioner object, is kept as its repr.
        """
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_KEPT}
        plain: dict[str, Any] = json.loads(json.dumps(kept, default=_plain))
        return plain

    def differences(self, kept: Mapping[str, Any]) -> list[str]:
        """Name what this run would compute differently from a kept one.

        Args:
            kept: What `to_json` of the other run gave; both runs resolved.

        Returns:
            One `name: kept, not given` text per setting that differs.
        """
        own = self.to_json()
        return [
            f"{name}: {kept.get(name)!r}, not {own[name]!r}"
            for name in own
            if name not in _FREE_ON_RESUME and own[name] != kept.get(name)
        ]


def from_json(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what `TrainConfig.to_json` gave into keyword arguments of `TrainConfig`.

    Raises:
        InputError: If it holds a setting that does not exist.
    """
    known = {f.name for f in fields(TrainConfig)} - _NOT_KEPT
    unknown = sorted(set(kept) - known)
    if unknown:
        raise InputError(f"config.json holds settings that do not exist: {', '.join(unknown)}")
    arguments = dict(kept)
    if arguments.get("widths") is not None:
        arguments["widths"] = tuple(arguments["widths"])
    if arguments.get("data_root") is not None:
        arguments["data_root"] = Path(arguments["data_root"])
    return arguments


def _plain(value: object) -> str:
    return str(value) if isinstance(value, Path) else repr(value)
