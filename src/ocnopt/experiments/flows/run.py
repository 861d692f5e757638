"""What a training run of a flow is, and the settings of the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ocnopt.experiments.flows.network import GAS, MINIBOONE, PLANE, FlowNetwork

__all__ = ["RECIPES", "FlowRun"]


@dataclass(frozen=True)
class FlowRun:
    """A run: what is learned, by what, and for how long.

    Attributes:
        density: Name of a density in the plane or of a table.
        network: The flow.
        optimizer: "adam", "sgd" or "snopt".
        lr: Learning rate.
        options: Keyword options of the optimizer's class.
        batch_size: Points per step.
        steps: Steps.
        every: Steps between two evaluations; one comes before the first step, one at the end.
        seed: Of weights, batches and Hutchinson's noise; not of the data.
        held: Points that are evaluated, "validation" or "test".
        share: Of the training points, the first ones.
        mesh: Points along a side of the square on which the learned density is kept; 0 for none.
    """

    density: str
    network: FlowNetwork = PLANE
    optimizer: str = "adam"
    lr: float = 1e-2
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    steps: int = 300
    every: int = 15
    seed: int = 0
    held: str = "validation"
    share: float = 1.0
    mesh: int = 0


_MOMENTUM = {"momentum": 0.9}


def _table(
    name: str,
    network: FlowNetwork,
    batch: int,
    epoch: int,
    rates: Mapping[str, tuple[float, int, Mapping[str, Any]]],
    share: float = 1.0,
) -> dict[str, FlowRun]:
    return {
        f"{name}-{optimizer}": FlowRun(
            density=name,
            network=network,
            optimizer=optimizer,
            lr=lr,
            options=options,
            batch_size=batch,
            steps=epochs * epoch,
            every=epoch,
            held="test",
            share=share,
        )
        for optimizer, (lr, epochs, options) in rates.items()
    }


#: Settings of the code that was released with SNOpt: learning rate, epochs, options.
RECIPES: dict[str, FlowRun] = {
    **_table(
        "miniboone",
        MINIBOONE,
        batch=128,
        epoch=230,  # 29,556 points
        rates={
            "adam": (3e-3, 20, {}),
            "sgd": (1e-2, 25, _MOMENTUM),
            "snopt": (5e-3, 10, {**_MOMENTUM, "damping": 0.1, "update_every": 250}),
        },
    ),
    **_table(
        "gas",
        GAS,
        batch=1000,
        epoch=85,  # of 852,174 points
        share=0.1,
        rates={
            "adam": (2e-3, 30, {}),
            "sgd": (1e-2, 30, _MOMENTUM),
            "snopt": (1e-2, 20, {**_MOMENTUM, "damping": 0.05, "update_every": 250}),
        },
    ),
}
