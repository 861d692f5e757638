"""Who runs a race: an optimizer, what it is given, and what is tried for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ocnopt.experiments.compare.contender import Contender as Swept
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError

__all__ = ["Contender"]


@dataclass(frozen=True)
class Contender(Swept):
    """An optimizer of a comparison that may be tried with values of one more option.

    Attributes:
        label: What tables and pictures call it.
        optimizer: Its command-line name, or `package.module:Class`.
        lrs: The learning rates it is tried at, ascending.
        options: Keyword options of the optimizer's class that are not tried but fixed.
        also: By name, the values of one more option: each is tried at every learning rate.

    Raises:
        InputError: The learning rates are not positive and ascending, `also` names more than one
            option, one that is fixed, no value, or a value twice.
    """

    also: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what is tried."""
        super().__post_init__()
        if len(self.also) > 1:
            raise InputError(f"{self.label}: only one more option is tried, not {list(self.also)}")
        for name, values in self.also.items():
            if name in self.options:
                raise InputError(f"{self.label}: {name} is fixed, so no values of it can be tried")
            if not values or any(value in values[:i] for i, value in enumerate(values)):
                raise InputError(f"{self.label}: {name} needs values, each once, not {values}")

    @property
    def candidates(self) -> int:
        """How many settings are tried."""
        values = [len(values) for values in self.also.values()]
        return len(self.lrs) * (values[0] if values else 1)

    def configs(self, base: TrainConfig) -> list[TrainConfig]:
        """Every setting that is tried, by learning rate first.

        Args:
            base: All that contenders share.
        """
        more: Iterable[Mapping[str, Any]] = ({},)
        for name, values in self.also.items():
            more = [{name: value} for value in values]
        return [
            replace(base, optimizer=self.optimizer, lr=lr, options={**self.options, **given})
            for lr, given in itertools.product(self.lrs, more)
        ]

    def edges(self, chosen: TrainConfig) -> dict[str, str]:
        """What lies at an end of what was tried, so that something beyond it may be better.

        Args:
            chosen: One of :meth:`configs`.

        Returns:
            `least` or `greatest` by name; an option has ends where its values are numbers.
        """
        tried: dict[str, Sequence[Any]] = {"lr": self.lrs, **self.also}
        found = {}
        for name, values in tried.items():
            numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
            value = chosen.lr if name == "lr" else chosen.options[name]
            if len(values) > 1 and len(numbers) == len(values):
                if value == min(numbers) and value != 0:  # nothing that is tried is below 0
                    found[name] = "least"
                elif value == max(numbers):
                    found[name] = "greatest"
        return found

    def setting(self, config: TrainConfig) -> str:
        """What distinguishes a setting from the contender's others, such as `lr 0.1, damping 1`."""
        parts = [f"lr {config.lr:g}"]
        for name in self.also:
            value = config.options[name]
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(parts)
