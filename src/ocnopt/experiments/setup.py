"""The data and the network that a configuration names."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ocnopt.experiments import datasets, networks
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.own import find, theirs

__all__ = ["build_network", "correct", "fcn_recipe", "load_data", "total_steps"]

_VALIDATION_SEED = 1


def load_data(config: TrainConfig) -> Data:
    """Load a run's data, the validation split in place of the test set where one is asked for.

    Raises:
        InputError: The data cannot be had, or are no classification data.
    """
    if ":" in config.dataset:
        data = _own_data(config.dataset, own_network=":" in config.network)
    else:
        data = datasets.load(config.dataset, config.data_root)  # type: ignore[arg-type]
    if config.validation:
        data = _validation_split(data, config.validation)
    if config.batch_size is not None and config.batch_size > len(data.train_y):
        raise InputError(
            f"batch-size {config.batch_size} is more than the {len(data.train_y)} training samples"
            f" of {config.dataset}; choose a smaller one"
        )
    return data


def _own_data(name: str, own_network: bool) -> Data:
    """Call the user's function; inputs that an own network may embed stay whole numbers."""
    with theirs(f"dataset {name}"):
        found = find(name, "dataset")()
    known = 0
    if isinstance(found, Data):
        known = found.classes
        found = (found.train_x, found.train_y, found.test_x, found.test_y)
    if not (isinstance(found, tuple | list) and len(found) == 4):
        raise InputError(
            f"dataset {name} returned {type(found).__name__}, not the four tensors (train_x, "
            "train_y, test_x, test_y)"
        )
    try:
        train_x, train_y, test_x, test_y = (torch.as_tensor(part) for part in found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"dataset {name} holds what is no tensor: {error}") from error
    for part, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        samples = len(x) if x.dim() else 0
        whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if y.dim() != 1 or samples != len(y) or not whole:
            raise InputError(
                f"dataset {name}: the {part} labels must be whole numbers, one per sample, but "
                f"have shape {tuple(y.shape)} and type {y.dtype} for {samples} samples"
            )
        if not samples:
            raise InputError(f"dataset {name}: the {part} set is empty")
        if int(y.min()) < 0:
            raise InputError(f"dataset {name}: the {part} labels must count from 0")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise InputError(
            f"dataset {name}: training inputs have shape {tuple(train_x.shape[1:])}, but test "
            f"inputs {tuple(test_x.shape[1:])}"
        )
    train_x, test_x = (
        x if own_network and not x.is_floating_point() else x.float() for x in (train_x, test_x)
    )
    needed = int(max(train_y.max(), test_y.max())) + 1
    if known and known < needed:
        raise InputError(f"dataset {name} says {known} classes, but its labels need {needed}")
    return Data(train_x, train_y.long(), test_x, test_y.long(), known or needed)


def _validation_split(data: Data, share: float) -> Data:
    """Keep a share of every class apart: the same one whatever the seed of a run."""
    generator = np.random.default_rng(_VALIDATION_SEED)
    kept = np.zeros(len(data.train_y), dtype=bool)
    labels = data.train_y.numpy()
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept[generator.permutation(members)[: round(share * len(members))]] = True
    if not kept.any() or kept.all():
        raise InputError(f"validation share {share:g} leaves no sample on one of the two sides")
    held, rest = torch.from_numpy(kept), torch.from_numpy(~kept)
    return Data(
        data.train_x[rest],
        data.train_y[rest],
        data.train_x[held],
        data.train_y[held],
        data.classes,
    )


def build_network(config: TrainConfig, data: Data) -> nn.Module:
    """Build a run's network, with weights from torch's current random state.

    Args:
        config: Resolved.
        data: Its data, which have the shape of inputs and the number of classes.

    Raises:
        InputError: The network does not fit the data, or is no module.
    """
    c, fits = config, (data.shape, data.classes)
    if c.network != "gru-ode" and ":" not in c.network and bool(data.train_x.isnan().any()):
        raise InputError(
            f"dataset {c.dataset} has missing values (series of different lengths, say), which "
            f"{c.network} cannot take; use --network gru-ode, or a network of your own"
        )
    if c.network == "fcn":
        return networks.fcn(fcn_recipe(c), *fits)
    if c.network == "cnn":
        assert c.channels and c.hidden and c.pools  # resolved
        return networks.cnn(networks.CNN(c.channels, c.hidden, c.pools), *fits)
    if c.network == "residual-fcn":
        assert c.widths and c.depth and c.activation
        return networks.residual_fcn(networks.ResidualFCN(c.widths, c.depth, c.activation), *fits)
    if c.network == "residual-cnn":
        assert c.widths and c.depth and c.norm
        return networks.residual_cnn(networks.ResidualCNN(c.widths, c.depth, c.norm), *fits)
    if c.network == "inception":
        assert c.widths and c.norm
        return networks.inception(networks.Inception(c.widths, c.norm), *fits)
    if c.network == "ode-cnn":
        assert c.channels and c.method and c.rtol and c.atol
        return networks.ode_cnn(networks.OdeCNN(c.channels, c.method, c.rtol, c.atol), *fits)
    if c.network == "gru-ode":
        assert c.hidden and c.stride and c.method and c.rtol and c.atol
        series = networks.GruODE(c.hidden, c.stride, c.method, c.rtol, c.atol)
        return networks.gru_ode(series, *fits)
    with theirs(f"network {config.network}"):
        build = find(config.network, "network")
        if isinstance(build, nn.Module):
            raise InputError(
                f"network {config.network} is a module ({type(build).__name__}), not a function or "
                "a class that builds one; name a function that returns it, made anew"
            )
        model = build(*_arguments(config.network, build, fits))
    if not isinstance(model, nn.Module):
        raise InputError(
            f"network {config.network} returned {type(model).__name__}, not an nn.Module"
        )
    return model


def _arguments(name: str, build: Callable[..., Any], all_: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a user's function takes: all, or nothing."""
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):
        return all_
    for arguments in (all_, ()):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return arguments
    raise InputError(
        f"network {name} is called with (shape, classes) or with nothing, but takes {signature}"
    )


def fcn_recipe(config: TrainConfig) -> networks.FCN:
    """The fully connected network of a resolved configuration."""
    assert config.widths is not None and config.activation is not None and config.head is not None
    return networks.FCN(config.widths, config.activation, config.head)


def total_steps(config: TrainConfig, per_epoch: int) -> int:
    """Steps after which a run ends, by its steps or its epochs, whichever come first."""
    ends = []
    if config.steps is not None:
        ends.append(config.steps)
    if config.epochs is not None:
        ends.append(config.epochs * per_epoch)
    return min(ends)


def correct(outputs: Tensor, y: Tensor) -> Tensor:
    """Whether each sample is classified right; outputs that are not finite count as wrong."""
    return (outputs.argmax(-1) == y) & torch.isfinite(outputs).all(-1)
