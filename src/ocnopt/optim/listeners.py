"""What the recorder asks of the optimizer while a pass is under way.

Neither holds the optimizer: the hooks on a model must not keep it alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ocnopt.control.passes import Pass
from ocnopt.control.players import Player
from ocnopt.control.replay import capture_setting
from ocnopt.control.tape import Tape

if TYPE_CHECKING:
    from ocnopt.optim.feedback import FeedbackOptimizer

__all__ = ["Due", "Watcher"]


class Due:
    """Says whose factors are due."""

    def __init__(self, optimizer: FeedbackOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self) -> frozenset[Player]:
        """Of the step that comes."""
        optimizer = self.optimizer()
        return frozenset() if optimizer is None else optimizer.due()


class Watcher:
    """Notes what a second pass will need when the model's forward begins."""

    def __init__(self, optimizer: FeedbackOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, recorded: Pass) -> None:
        """The model's forward begins."""
        optimizer = self.optimizer()
        if optimizer is None:
            return
        nonlinear = optimizer.rollout == "nonlinear" and not optimizer.full
        if not (nonlinear or optimizer.full or optimizer.measures_next):
            return
        recorded.setting = capture_setting(optimizer.model)
        if nonlinear:
            columns = optimizer.terminal.rank_r
            recorded.tape = Tape(optimizer.model, optimizer.players, columns)
