"""Kronecker factors of a vector field's layers along the adjoint (methods 4.4 and 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ocnopt.control.players import Player
from ocnopt.curvature.metric import to_float
from ocnopt.layers.base import Capture
from ocnopt.ode.listener import Field, Parts

__all__ = ["AdjointStatistics", "Moments"]


class Moments:
    """What was seen of one layer since the last step.

    Attributes:
        inputs: ``sum of duration z z^T`` over samples, locations and points of time,
            (groups, in, in).
        signals: ``sum of D duration g g^T`` likewise, of gradients of the loss as the loop scaled
            it, (groups, out, out).
        weight: ``sum of duration`` over samples, locations and points of time.
        points: Points of time.
    """

    __slots__ = ("inputs", "points", "signals", "weight")

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.signals: Tensor | None = None
        self.weight = 0.0
        self.points = 0

    def add(self, inputs: Tensor, signals: Tensor, weight: float, points: int = 0) -> None:
        """Add to every sum."""
        self.inputs = inputs if self.inputs is None else self.inputs + inputs
        self.signals = signals if self.signals is None else self.signals + signals
        self.weight += weight
        self.points += points


class _Pass:
    """What one backward pass brought: samples, and moments by player."""

    def __init__(self) -> None:
        self.rows = 0
        self.moments: dict[Player, Moments] = {}


class AdjointStatistics:
    """Follows the adjoints of Neural ODEs and gathers their layers' factors.

    With the low-rank adjoint of rank one, ``p_n = int z_n (x) g_n dt`` is a layer's gradient, where
    z are its inputs (with a one for the bias), ``g = (dF/dh)^T a`` and a the adjoint. Points of
    time are treated as locations of a convolution are: as independent. So

        A = mean of z z^T,    B = D int E[g g^T] dt,    Q_uu ~ A (x) B

    with g per sample, D the sample step. Solves add up until :meth:`clear`. A backward pass that
    was asked for other gradients than the layers' counts only where there was no other.

    Args:
        players: Layers of the fields.
        step: Returns D.
        due: Returns the players whose factors are wanted in this backward pass.
        begin: Called where a backward pass begins and others came before it, which it may clear.
    """

    def __init__(
        self,
        players: Sequence[Player],
        step: Callable[[], float],
        due: Callable[[], Collection[Player]],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.players = list(players)
        self._step = step
        self._due = due
        self._begin = begin
        self._passes: dict[int, _Pass] = {}
        self._counted: set[int] = set()
        self._task = -1

    def clear(self) -> None:
        """Forget what was seen."""
        self._passes = {}
        self._counted = set()

    def count(self, task: int) -> None:
        """A layer's gradient was accumulated in that backward pass."""
        self._counted.add(task)

    @property
    def _seen(self) -> list[_Pass]:
        """The passes that count."""
        counted = [p for task, p in self._passes.items() if task in self._counted]
        return counted or list(self._passes.values())

    @property
    def samples(self) -> int:
        """Samples whose gradients arrived, each counted once per backward pass."""
        return sum(p.rows for p in self._seen)

    @property
    def moments(self) -> dict[Player, Moments]:
        """Moments of every layer that was seen."""
        seen = self._seen
        if len(seen) == 1:
            return seen[0].moments
        total: dict[Player, Moments] = {}
        for part in seen:
            for player, m in part.moments.items():
                assert m.inputs is not None and m.signals is not None
                found = total.setdefault(player, Moments())
                found.add(m.inputs, m.signals, m.weight, m.points)
        return total

    # as a listener

    @property
    def sample_step(self) -> float | None:
        """D where factors are due."""
        return self._step() if self._due() else None

    def arrived(self, task: int, field: Field, end: Tensor, x: Parts, gradient: Parts) -> None:
        """Count the samples."""
        if task not in self._passes:
            if all(q.grad is None for player in self.players for q in player.params):
                self.clear()  # whatever the passes before this one brought was thrown away
            if self._passes:
                self._begin()
            others = {k: p for k, p in self._passes.items() if k in self._counted}
            self._passes = {**others, task: _Pass()}
        self._task = task
        rows = x[0].shape[0] if x[0].dim() else 1
        self._passes[task].rows = max(rows, self._passes[task].rows)

    def sample(self, field: Field, t: Tensor, x: Parts, a: Parts, duration: float | Tensor) -> None:
        """Evaluate the field once more and gather every due layer's moments."""
        calls: list[tuple[Player, Capture, GradientEdge]] = []

        def keep(player: Player) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                if not isinstance(out, Tensor) or not out.requires_grad:
                    return
                capture = player.layer.capture(module, args, kwargs)
                # The edge stays the layer's own, whatever is done to its output in place.
                calls.append((player, capture, get_gradient_edge(out)))

            return hook

        due = self._due()
        handles = [
            p.module.register_forward_hook(keep(p), prepend=True, with_kwargs=True) for p in due
        ]
        try:
            with torch.enable_grad():
                outputs = field(t, x)
        finally:
            for handle in handles:
                handle.remove()
        pairs = [(f, v.to(f.dtype)) for f, v in zip(outputs, a, strict=True) if f.requires_grad]
        if not calls or not pairs:
            return
        fs, vs = zip(*pairs, strict=True)
        grads = torch.autograd.grad(fs, [edge for _, _, edge in calls], vs, allow_unused=True)
        moments = self._passes[self._task].moments
        for (player, capture, _), g in zip(calls, grads, strict=True):
            if g is not None:
                found = moments.setdefault(player, Moments())
                self._add(found, player, capture, g.detach(), duration)
        for player in due:
            if player in moments:
                moments[player].points += 1

    def _add(
        self, found: Moments, player: Player, capture: Capture, g: Tensor, duration: float | Tensor
    ) -> None:
        layer, dtype = player.layer, to_float(player.params[0].dtype)
        z = layer.features(capture, dtype)
        if g.dim() == 1:  # called on one vector for all samples
            z, g = z.unsqueeze(0), g.unsqueeze(0)
        rows, cols = layer.rows(z), layer.cols(g.to(dtype))
        if isinstance(duration, Tensor) and len(duration) != len(rows):
            duration = float(duration.mean())  # its rows are no samples
        if isinstance(duration, Tensor):
            weight, scale = float(duration.sum()), 1.0
            root = duration.to(dtype).sqrt().view(-1, 1, 1, 1)
            rows, cols = rows * root, cols * root
        else:
            weight, scale = duration * len(rows), duration
        inputs = layer.second_moment(rows) * scale
        signals = layer.second_moment(cols) * (scale * self._step())
        found.add(inputs, signals, weight * rows.shape[1])

    # what came of it

    def factors(self, player: Player, count: int, per_sample: float) -> tuple[Tensor, Tensor]:
        """A and B of a layer whose moments were gathered.

        Args:
            player: The layer.
            count: Samples in the step.
            per_sample: What turns a gradient of the loss into one sample's own.

        Returns:
            (groups, in, in) and (groups, out, out).
        """
        found = self.moments[player]
        assert found.inputs is not None and found.signals is not None
        return found.inputs / found.weight, found.signals * (per_sample**2 / count)

    def sums(self, player: Player) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, signals and weight of :class:`Moments`; zeros where nothing was seen."""
        found = self.moments.get(player)
        matrix = player.layer.to_matrix(tuple(p.detach() for p in player.params))
        matrix = matrix.to(to_float(matrix.dtype))
        groups, out, into = matrix.shape
        if found is None or found.inputs is None or found.signals is None:
            inputs, signals = (
                matrix.new_zeros(groups, into, into),
                matrix.new_zeros(groups, out, out),
            )
            return inputs, signals, matrix.new_zeros(())
        return found.inputs, found.signals, matrix.new_tensor(found.weight)
