"""What a Neural ODE tells those who listen while its gradient is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor

__all__ = ["Field", "Listener", "Parts"]

#: A state's tensors.
Parts: TypeAlias = "tuple[Tensor, ...]"
#: ``field(t, x)`` returns dx/dt.
Field: TypeAlias = Callable[[Tensor, Parts], Parts]


class Listener(Protocol):
    """Who follows the backward passes of a Neural ODE."""

    @property
    def sample_step(self) -> float | None:
        """Time between two samples of this backward pass; None where none are wanted."""

    def arrived(
        self,
        task: int,
        field: Field,
        end: Tensor,
        x: Parts,
        gradient: Parts,
    ) -> None:
        """A gradient reached the end of a solve.

        Args:
            task: Number of the backward pass.
            field: What was solved.
            end: The last time.
            x: The state there.
            gradient: dL/dx there.
        """

    def sample(
        self,
        field: Field,
        t: Tensor,
        x: Parts,
        a: Parts,
        duration: Any,
    ) -> None:
        """A point of the adjoint.

        Args:
            field: What is being solved.
            t: Time.
            x: The state.
            a: The adjoint ``dL/dx(t)``.
            duration: The time that this point stands for; of every sample (B,) where samples have
                times of their own, which t then holds.
        """
