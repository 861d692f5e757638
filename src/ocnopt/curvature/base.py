"""What a preconditioner is: how ``M_t`` of Table 2 follows from the Bellman objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from ocnopt.curvature.factorize import Eigenbases
from ocnopt.curvature.metric import Metric, Rates
from ocnopt.errors import OptionError
from ocnopt.layers.base import Layer, Params
from ocnopt.real import is_scalar

State = dict[str, Any]


@dataclass
class Observation:
    """What one player's preconditioner sees of a step.

    Attributes:
        states: The optimizer's state of every parameter, in the layer's order.
        rates: Learning rates, likewise.
        mean: Returns ``E[Q_u]`` (with weight decay where the rule wants it in the gradient).
        layer: The layer; None for parameters that no player owns.
        factors: Returns ``E[a a^T]`` (groups, in, in), ``locations * E[V_h V_h^T]``
            (groups, out, out) of the batch; None where there is no player.
        samples: Samples in the step, over all processes.
        step: The optimizer's steps before this one; None: those that had this observation.
        eigenbases: Where those of the step are found.
        report: Damping in use and factorization failures, filled in by the preconditioner.
    """

    states: list[State]
    rates: Rates
    mean: Callable[[], Params]
    layer: Layer | None = None
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None
    samples: int = 1
    step: int | None = None
    eigenbases: Eigenbases = field(default_factory=Eigenbases)
    report: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Preconditioner(ABC):
    """Options of a preconditioner; its state lives in the optimizer, so it can be shared.

    A step that fails must leave the state as it was: the states handed over are shallow copies,
    and their tensors are replaced, never written into.
    """

    name: ClassVar[str]
    #: Weight decay enters the gradient before M (as torch's optimizers do) or is added after it.
    decay_first: ClassVar[bool] = True
    #: M is diagonal and built from the very gradient whose entries it divides.
    adaptive: ClassVar[bool] = False
    #: Needs Kronecker factors, hence a player with matrix parameters.
    factored: ClassVar[bool] = False

    def due(self, state: State, step: int | None = None) -> bool:
        """Whether an observation in the optimizer's step of that number asks for factors."""
        return False

    @abstractmethod
    def observe(self, seen: Observation) -> Metric:
        """Update ``M_t`` with this step's Bellman objective and return its inverse."""

    def direction(
        self, metric: Metric, states: Sequence[State], d: Params, own: bool = False
    ) -> Params:
        """The step before the learning rate: ``M^-1 d``, in new tensors unless ``M = I``.

        Args:
            metric: What :meth:`observe` returned.
            states: The optimizer's state of every parameter, as :meth:`observe` left it.
            d: The direction.
            own: Whether d may be written into.
        """
        return metric.solve_(d) if own else metric.solve(d)

    def options(self) -> dict[str, Any]:
        """Name and options as plain values, for checkpoints."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def check_number(self, option: str, ok: Callable[[Any], bool], wanted: str) -> None:
        """Raise an :class:`OptionError` unless the option is a number for which ``ok`` holds."""
        value = getattr(self, option)
        self.check(option, is_scalar(value) and bool(ok(value)), f"it must be a number {wanted}")

    def check(self, option: str, ok: bool, wanted: str) -> None:
        """Raise an :class:`OptionError` that names the option unless ``ok``."""
        if not ok:
            value = getattr(self, option)
            raise OptionError(f"{type(self).__name__}: {option}={value!r}, but {wanted}")
