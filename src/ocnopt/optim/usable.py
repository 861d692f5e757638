"""Whether a step can be made of what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import nn

from ocnopt.control.passes import Pass
from ocnopt.errors import GraphError, RecordingError

__all__ = ["refuse_unused", "require_replayable"]


def refuse_unused(criterion: nn.Module, ignored: str) -> NoReturn:
    """Raise: no call of the criterion had a part in the gradients.

    Args:
        criterion: The one that the optimizer was given.
        ignored: Why its last call could not be used, if it was called.
    """
    what = f"could not be used: {ignored}" if ignored else "took no part in the last step"
    raise RecordingError(
        f"the criterion given to the optimizer ({type(criterion).__name__}) {what}, so the cost's "
        "curvature and scale are unknown; call that very module on the model's output, or leave it "
        "out of the constructor"
    )


def require_replayable(passes: Sequence[Pass]) -> None:
    """Raise unless the step's one forward pass can be run once more, for ``rollout="nonlinear"``.

    Raises:
        GraphError: There were several, or several calls of the model in it.
    """
    if len(passes) > 1 or passes[0].forwards != 1 or passes[0].tape is None:
        raise GraphError(
            f"rollout='nonlinear' runs the last forward pass again, but {len(passes)} passes with "
            f"{passes[0].forwards} calls of the model led to this step; use rollout='linear' with "
            "gradient accumulation or several calls, and torch.no_grad() for evaluation"
        )
