"""The settings of one training run; imports nothing heavy, so that the command line starts fast."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import (
    BLOCK_WIDTHS,
    CHANNELS,
    HIDDEN,
    LEARNING_RATES,
    NETWORK_SETTINGS,
    OF_LINEAR_LAYERS,
    ON_ONE_THREAD,
    PROBLEMS,
    Activation,
    DatasetName,
    Head,
    NetworkName,
    Norm,
    OptimizerName,
    Problem,
    Solver,
)

DEFAULT_EPOCHS = 10
# What a data set that is not one of ours starts from.
_OWN = Problem(batch_size=32, widths=(32, 32, 32, 32), activation="relu")

# Settings that say where, for how long and how watchfully a run goes, not what it computes: these
# may differ when a run is resumed.
_FREE_ON_RESUME = frozenset(
    {"epochs", "steps", "output", "resume", "data_root", "device", "threads"}
    | {"log_every", "checkpoint_every", "curve", "evaluate_every"}
)
# Settings that say how a command was called; they are not kept with the run.
_NOT_KEPT = frozenset({"output", "resume"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. None means the default of the data set or optimizer.

    Attributes:
        dataset: Data set to train on: a name, or `module:function` that returns a
            :class:`~ocnopt.experiments.datasets.Data` or the tensors or arrays (train_x, train_y,
            test_x, test_y).
        network: Network recipe, `fcn`, `cnn`, `residual-fcn`, `residual-cnn`, `inception`,
            `ode-cnn` or `gru-ode`, or `module:function` that is called with (shape, classes), or
            with nothing if it takes nothing, and returns an `nn.Module`.
        optimizer: Optimizer by its command-line name, or `package.module:Class`.
        lr: Learning rate, positive.
        options: Keyword options of the optimizer's class.
        widths: Hidden widths of `fcn`; widths, or channels, of the blocks of `residual-fcn`,
            `residual-cnn` and `inception`.
        activation: Non-linearity of `fcn` and `residual-fcn`.
        head: What `fcn` applies to its last layer's output.
        channels: Channels of `cnn` and `ode-cnn`.
        hidden: Width between the two linear layers of `cnn`; features of the state of `gru-ode`.
        stride: Of a series, `gru-ode` sees every so manieth observation.
        pools: Convolutions of `cnn`, two out of 1 to 4, that a max-pool follows.
        depth: Layers on the main path of a block of `residual-fcn` and `residual-cnn`.
        norm: Normalization in `residual-cnn` and `inception`.
        method: Solver of the differential equation in `ode-cnn` and `gru-ode`.
        rtol: Its relative tolerance.
        atol: Its absolute tolerance.
        validation: Share of the training set that is kept apart, always the same one, and tested
            on in place of the test set, as tuning needs it; in [0, 1).
        batch_size: Samples per step; an epoch's last incomplete batch is dropped.
        epochs: Passes over the training set.
        steps: Optimizer steps. The run ends at whichever of `epochs` and `steps` comes first.
        seed: Seed of the initial weights and of the data order.
        output: Folder that the run is written to; None writes nothing.
        resume: Take up the run in `output` from its checkpoint.
        data_root: Folder with the data sets that are files.
        device: Torch device.
        threads: Threads that torch may use. None: one for `fcn`, `residual-fcn` and `gru-ode`,
            whose products are too small to be shared and suffer badly where cores are busy; torch's
            own setting for networks of convolutions.
        log_every: Steps from one logged row to the next; epoch ends are logged too.
        curve: Whether a grid keeps this run's loss and accuracy over time.
        evaluate_every: Epochs from one evaluation to the next, such as 0.25; one comes before the
            first step and one at the end, too. A grid keeps them with the seconds of training
            until each, and trains such a run alone. None: at the ends of epochs.
        checkpoint_every: Steps from one checkpoint to the next; epoch ends are kept too.

    Raises:
        InputError: If a value is out of its range, or two do not go together.
    """

    dataset: DatasetName | str = "digits"
    network: NetworkName | str = "fcn"
    optimizer: OptimizerName | str = "ddpnopt"
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] | None = None
    activation: Activation | None = None
    head: Head | None = None
    channels: int | None = None
    hidden: int | None = None
    stride: int | None = None
    pools: tuple[int, int] | None = None
    depth: int | None = None
    norm: Norm | None = None
    method: Solver | None = None
    rtol: float | None = None
    atol: float | None = None
    validation: float = 0.0
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
    curve: bool = False
    evaluate_every: float | None = None

    def __post_init__(self) -> None:
        """Check every value, so that a bad one fails here and not in the middle of a run."""
        for name, kind, own in (
            ("dataset", DatasetName, "module:function"),
            ("network", NetworkName, "module:function"),
            ("optimizer", OptimizerName, "package.module:Class"),
            ("activation", Activation, ""),
            ("head", Head, ""),
            ("norm", Norm, ""),
            ("method", Solver, ""),
        ):
            value, choices = getattr(self, name), get_args(kind)
            fits = value in choices or (value is None and not own) or (own and ":" in value)
            if not fits:
                more = f", or give your own as {own}" if own else ""
                raise InputError(
                    f"{name} {value!r} is not known; choose from {', '.join(choices)}{more}"
                )
        whole = ("batch_size", "epochs", "steps", "threads", "log_every", "checkpoint_every")
        for name in (*whole, "channels", "hidden", "stride", "depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise InputError(f"{flag} must be at least 1, not {value}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be a positive number, not {self.lr}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a positive number, not {value}")
        every = self.evaluate_every
        if every is not None and not (math.isfinite(every) and every > 0):
            raise InputError(f"evaluate-every must be a positive number of epochs, not {every}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and {2**32 - 1}, not {self.seed}")
        if self.widths is not None and (not self.widths or min(self.widths) < 1):
            raise InputError(f"widths must be one or more positive numbers, not {self.widths}")
        if not 0 <= self.validation < 1:
            raise InputError(f"validation must be a share in [0, 1), not {self.validation}")
        ours = self.network in get_args(NetworkName)
        if ours and self.network not in OF_LINEAR_LAYERS and self.dataset in ("wine", "clusters"):
            what = "time series" if self.network == "gru-ode" else "images"
            raise InputError(
                f"network {self.network} needs {what} and {self.dataset} has none; use --network "
                f"{' or '.join(sorted(OF_LINEAR_LAYERS))}"
            )
        for name, networks in NETWORK_SETTINGS.items():
            if getattr(self, name) is not None and self.network not in networks:
                raise InputError(
                    f"{name} belongs to --network {', '.join(networks)}, not to {self.network}"
                )
        pools = self.pools
        if pools is not None and not (len(pools) == 2 and 1 <= pools[0] < pools[1] <= 4):
            raise InputError(f"pools must be two of 1 to 4, in order, not {self.pools}")
        if ":" in self.optimizer and self.lr is None:
            raise InputError(f"optimizer {self.optimizer} needs a learning rate; give it with --lr")
        if self.resume and self.output is None:
            raise InputError("resume needs the run's folder; give it with --output")

    def resolved(self) -> TrainConfig:
        """Return the same run with every default filled in."""
        problem = PROBLEMS.get(self.dataset, _OWN)  # type: ignore[call-overload]
        network = {
            "widths": BLOCK_WIDTHS.get(self.network, problem.widths),
            "activation": problem.activation,
            "head": "identity",
            "channels": CHANNELS.get(self.network),
            "hidden": HIDDEN.get(self.network),
            "stride": 1,
            "pools": (2, 4),
            "depth": 2,
            "norm": "none",
            "method": "dopri5",
            "rtol": 1e-3,
            "atol": 1e-3,
        }
        given: dict[str, Any] = {
            name: (getattr(self, name) or usual) if self.network in NETWORK_SETTINGS[name] else None
            for name, usual in network.items()
        }
        no_end = self.epochs is None and self.steps is None
        return replace(
            self,
            lr=LEARNING_RATES[self.optimizer] if self.lr is None else self.lr,  # type: ignore[index]
            options=dict(self.options),
            **given,
            batch_size=self.batch_size or problem.batch_size,
            epochs=DEFAULT_EPOCHS if no_end else self.epochs,
            threads=self.threads or (1 if self.network in ON_ONE_THREAD else None),
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
        InputError: If it holds a setting that does not exist, or a value of another type.
    """
    known = {f.name for f in fields(TrainConfig)} - _NOT_KEPT
    unknown = sorted(set(kept) - known)
    if unknown:
        raise InputError(f"config.json holds settings that do not exist: {', '.join(unknown)}")
    types = get_type_hints(TrainConfig)
    for name, value in kept.items():
        if not _fits(value, types[name]):
            raise InputError(f"config.json is damaged: {name} cannot be {value!r}")
    arguments = dict(kept)
    for name in ("widths", "pools"):
        if arguments.get(name) is not None:
            arguments[name] = tuple(arguments[name])
    if arguments.get("data_root") is not None:
        arguments["data_root"] = Path(arguments["data_root"])
    return arguments


def _fits(value: object, wanted: Any) -> bool:
    """Whether a value of a JSON file is one of the type that a setting has."""
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, int) for v in value)
    if wanted in (int, float):
        numbers = (int, float) if wanted is float else (int,)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if wanted is Path or origin is Literal:  # which names there are is checked later
        return isinstance(value, str)
    return isinstance(value, origin or wanted)


def _plain(value: object) -> str:
    return str(value) if isinstance(value, Path) else repr(value)
