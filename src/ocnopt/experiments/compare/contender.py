"""What is compared: an optimizer, its options and the learning rates it is tried at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.options import parse_options
from ocnopt.experiments.problems import LEARNING_RATES

__all__ = ["Contender", "parse_contender", "parse_rates", "usual_rates"]

#: Learning rates of the usual sweep, and how many times smaller and greater than the usual rate
#: its ends are: greater ones are where optimizers differ.
_COUNT, _BELOW, _ABOVE = 8, 10.0, 30.0
_RATES_HELP = "give FROM:TO:COUNT, as in 0.01:1:7, or a list, as in 0.1,0.2,0.4"


@dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison.

    Attributes:
        label: What tables and pictures call it.
        optimizer: Its command-line name, or `package.module:Class`.
        lrs: The learning rates it is tried at, ascending.
        options: Keyword options of the optimizer's class.

    Raises:
        InputError: There is no learning rate, or they are not positive, or not ascending.
    """

    label: str
    optimizer: str
    lrs: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the learning rates."""
        good = all(math.isfinite(lr) and lr > 0 for lr in self.lrs)
        if not self.lrs or not good or sorted(set(self.lrs)) != list(self.lrs):
            raise InputError(
                f"{self.label}: learning rates must be positive and ascending, not {self.lrs}"
            )


def parse_contender(text: str, lrs: tuple[float, ...] | None = None) -> Contender:
    """Read `name key=value ...`, where the key lr stands for a sweep of its own.

    Args:
        text: Such as `ddpnopt preconditioner=rmsprop lr=0.001:0.1:7`.
        lrs: Learning rates where the text has none; None for those around the usual one.

    Raises:
        InputError: The text cannot be read, or an optimizer of one's own has no learning rates.
    """
    words = text.split()
    if not words or "=" in words[0]:
        raise InputError(
            f"optimizer {text!r} does not start with a name; write it as in"
            " 'ddpnopt preconditioner=rmsprop'"
        )
    name, rest = words[0], words[1:]
    own = [word.partition("=")[2] for word in rest if word.startswith("lr=")]
    others = [word for word in rest if not word.startswith("lr=")]
    if len(own) > 1:
        raise InputError(f"optimizer {text!r} has two sweeps of lr; give one")
    options = parse_options(others)
    if own:
        lrs = parse_rates(own[0])
    return Contender(
        label=" ".join([name, *others]),
        optimizer=name,
        lrs=usual_rates(name, options) if lrs is None else lrs,
        options=options,
    )


def parse_rates(text: str) -> tuple[float, ...]:
    """Read `from:to:count`, evenly spaced logarithms, or values with commas.

    Returns:
        The learning rates, ascending, to four significant digits where they are computed.

    Raises:
        InputError: It is neither.
    """
    try:
        if ":" in text:
            low, high, count = text.split(":")
            return _log_spaced(float(low), float(high), int(count))
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"lr {text!r} cannot be read; {_RATES_HELP}") from None
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise InputError(f"lr {text!r} has a rate that is not positive; {_RATES_HELP}")
    return tuple(rates)


def usual_rates(optimizer: str, options: Mapping[str, Any]) -> tuple[float, ...]:
    """The sweep of an optimizer where none is given: a tenth to 30 times its usual rate.

    What DDPNOpt and DGNOpt share with the optimizer that lends M, they share with it here, too.

    Raises:
        InputError: It is an optimizer of one's own, whose usual rate nobody knows.
    """
    known: Mapping[str, float] = {str(name): rate for name, rate in LEARNING_RATES.items()}
    lender = str(options.get("preconditioner")).replace("identity", "sgd")
    rate = known.get(lender, known.get(optimizer))
    if rate is None and ":" not in optimizer:
        raise InputError(
            f"optimizer {optimizer!r} is not known; choose from {', '.join(LEARNING_RATES)}, or"
            " give your own as package.module:Class"
        )
    if rate is None:
        raise InputError(
            f"optimizer {optimizer} needs learning rates; write"
            f" '{optimizer} lr=0.001:0.1:7', or give --lr for all"
        )
    return _log_spaced(rate / _BELOW, rate * _ABOVE, _COUNT)


def _log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    if not (0 < low < high < math.inf) or count < 2:
        raise ValueError("no sweep")
    ratio = math.log(high / low) / (count - 1)
    return tuple(float(f"{low * math.exp(i * ratio):.4g}") for i in range(count))
