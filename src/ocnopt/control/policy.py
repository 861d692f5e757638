"""A player's policy ``du = k + K dx`` and the value function it came from, for looking at.

Everything is per sample, of the sample's own cost, in the units in which the policy is stated:
``k = -Q_uu^-1 Q_u`` and ``K = -Q_uu^-1 Q_ux`` with ``Q_uu = M / eta`` (Eq. 2, Table 2). Parameters
are flattened one after the other (weight, bias), states in the order of their elements. Nothing is
computed before it is asked for, and matrices are kept as factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.chain import replaced
from ocnopt.control.dense import DenseTrace
from ocnopt.control.dense_sweep import DenseSweep
from ocnopt.control.sweep import Sweep
from ocnopt.control.trace import Trace
from ocnopt.control.turns import Turn
from ocnopt.errors import GraphError
from ocnopt.layers.base import Params

__all__ = ["Factored", "Policies", "Policy"]


@dataclass(frozen=True, repr=False)
class Factored:
    """``left core right^T + rest + ridge I``, a matrix per sample.

    Attributes:
        left: (B, m, r).
        core: (B, r, r).
        right: (B, n, r).
        rest: What has no factor, (B, m, n), or None.
        ridge: A multiple of the identity.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    rest: Tensor | None = None
    ridge: float = 0.0

    def __repr__(self) -> str:
        return f"Factored(shape={tuple(self.shape)}, rank={self.rank})"

    @property
    def shape(self) -> torch.Size:
        """(B, m, n)."""
        return torch.Size((*self.left.shape[:2], self.right.shape[1]))

    @property
    def rank(self) -> int:
        """The number of columns r."""
        return self.core.shape[-1]

    def materialize(self) -> Tensor:
        """The matrices, (B, m, n)."""
        out = self.left @ self.core @ self.right.transpose(1, 2)
        if self.rest is not None:
            out = out + self.rest
        if self.ridge:
            out.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return out

    def mean(self) -> Tensor:
        """Their mean over samples, (m, n), without forming them one by one."""
        left = (self.left @ self.core).transpose(0, 1).flatten(1)  # (m, B r)
        out = left @ self.right.transpose(0, 1).flatten(1).t() / self.left.shape[0]
        if self.rest is not None:
            out = out + self.rest.mean(0)
        if self.ridge:
            out.diagonal().add_(self.ridge)
        return out

    def apply(self, dx: Tensor) -> Tensor:
        """Products with vectors (B, n): (B, m)."""
        inner = self.core @ (self.right.transpose(1, 2) @ dx.unsqueeze(-1))
        out = (self.left @ inner).squeeze(-1)
        if self.rest is not None:
            out = out + (self.rest @ dx.unsqueeze(-1)).squeeze(-1)
        return out + self.ridge * dx if self.ridge else out


@dataclass
class _Part:
    """A player in one recorded pass."""

    batch: Batch
    trace: Trace
    x: Tensor
    v: Tensor
    k: Tensor
    at_input: Callable[[], tuple[Tensor, Tensor]]
    mixed: Params | None


class Policy:
    """The policy of one player in the last step.

    Args:
        sweep: The finished sweep.
        turn: The player's turn in it.
        weights: Its parameters before the step.
    """

    def __init__(self, sweep: Sweep, turn: Turn, weights: Params) -> None:
        assert turn.metric is not None
        self._player = turn.player
        self._metric = turn.metric
        self._weights = weights
        self._ridge = sweep.value_reg if isinstance(sweep, DenseSweep) else 0.0
        self._parts = [
            part for i in range(len(sweep.batches)) if (part := _part(sweep, turn, i)) is not None
        ]

    def __repr__(self) -> str:
        return f"Policy({self.name!r}, parameters={self.parameters})"

    @property
    def name(self) -> str:
        """The player's module name."""
        return self._player.name

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters it owns, in the order of all flattened ones."""
        return self._player.layer.names

    @property
    def Q_u(self) -> Tensor:
        """Gradient of the Bellman objective, (B, m)."""
        parts = []
        for part in self._parts:
            columns = self._parameter_columns(part)  # (B, r, m)
            parts.append((part.batch.signal_own(part.v).view(len(columns), 1, -1) @ columns)[:, 0])
        return torch.cat(parts)

    @property
    def Q_ux(self) -> Factored:
        """Mixed second derivative, (B, m, n)."""
        return self._join([self._q_ux(part) for part in self._parts])

    @property
    def k(self) -> Tensor:
        """Open-loop gain ``-Q_uu^-1 Q_u``, (B, m); the batch's is its mean."""
        return self._gain(self.Q_u.unsqueeze(1))[:, 0]

    @property
    def K(self) -> Factored:
        """Feedback gain ``-Q_uu^-1 Q_ux``, (B, m, n), before any bound on feedback."""
        q = self.Q_ux
        left = self._gain(q.left.transpose(1, 2)).transpose(1, 2)
        rest = None
        if q.rest is not None:
            rest = self._gain(q.rest.transpose(1, 2)).transpose(1, 2)
        return Factored(left, q.core, q.right, rest)

    @property
    def V_x(self) -> Tensor:
        """Value gradient at the player's input, (B, n).

        Raises:
            GraphError: The input is not differentiable, or the layer was called more than once.
        """
        parts = []
        for part in self._parts:
            v, _ = part.at_input()
            if isinstance(part.trace, DenseTrace):
                parts.append(v)
            else:
                columns = self._state_columns(part)
                parts.append((columns @ _as_column(part.batch.signal_own(v)))[..., 0])
        return torch.cat(parts)

    @property
    def V_xx(self) -> Factored:
        """Value Hessian at the player's input, (B, n, n)."""
        found = []
        for part in self._parts:
            _, k = part.at_input()
            if isinstance(part.trace, DenseTrace):
                eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device).expand_as(k)
                k = k.clone()
                k.diagonal(dim1=1, dim2=2).sub_(self._ridge)
                found.append(Factored(eye, k, eye, ridge=self._ridge))
            else:
                columns = self._own(part, self._state_columns(part))
                found.append(Factored(columns, _as_matrix(k), columns))
        return self._join(found)

    def as_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Flattened parameters (..., m) by name, each (..., *parameter)."""
        shapes = self._player.layer.shapes
        sizes = [torch.Size(shape).numel() for shape in shapes]
        pieces = flat.split(sizes, -1)
        return {
            name: piece.reshape(*flat.shape[:-1], *shape)
            for name, piece, shape in zip(self.parameters, pieces, shapes, strict=True)
        }

    # how it is formed

    def _join(self, found: list[Factored]) -> Factored:
        if len(found) == 1:
            return found[0]
        rests = [f.rest for f in found if f.rest is not None]
        return Factored(
            torch.cat([f.left for f in found]),
            torch.cat([f.core for f in found]),
            torch.cat([f.right for f in found]),
            torch.cat(rests) if rests else None,
            found[0].ridge,
        )

    def _own(self, part: _Part, columns: Tensor) -> Tensor:
        """Recorded columns (B, n, r) in the sample's own units: the first one is scaled."""
        if isinstance(part.trace, DenseTrace):
            return columns
        eye = torch.eye(columns.shape[2], dtype=columns.dtype, device=columns.device)
        scales = torch.stack(
            [_as_vector(part.batch.signal_own(_as_rank(row, part))) for row in eye], 1
        )
        return columns @ scales.transpose(1, 2).to(columns.dtype)

    def _parameter_columns(self, part: _Part) -> Tensor:
        """``P_u``, (B, r, m)."""
        trace = part.trace
        formed = trace.sample_columns()
        return torch.cat([p.flatten(2) for p in formed], 2).to(trace.dtype)

    def _state_columns(self, part: _Part) -> Tensor:
        """``P_x = g_x^T P_h`` at the player's own input, (B, n, r)."""
        trace, name = part.trace, self.name
        if not part.x.is_floating_point():
            raise GraphError(f"the input of layer {name!r} is not differentiable: it has no V_x")
        if isinstance(trace, DenseTrace):
            columns = trace.units()
        elif len(trace.columns) == 1:
            columns = trace.columns[0]
        else:
            raise GraphError(
                f"layer {name!r} was called more than once: its input is not one state"
            )
        with torch.enable_grad(), replaced(self._player, self._weights):
            x = part.x.detach().to(columns.dtype).requires_grad_()
            h = self._player.module.forward(x)
            (found,) = torch.autograd.grad(h, x, columns, is_grads_batched=True)
        flat = found.reshape(len(columns), trace.samples, -1)
        return flat.permute(1, 2, 0).to(trace.dtype)

    def _q_ux(self, part: _Part) -> Factored:
        rest = None
        if part.mixed is not None:
            rest = torch.cat([p.flatten(2) for p in part.mixed], 2).transpose(1, 2)
        left = self._own(part, self._parameter_columns(part).transpose(1, 2))
        right = self._own(part, self._state_columns(part))
        return Factored(left, _as_matrix(part.k), right, rest)

    def _gain(self, rows: Tensor) -> Tensor:
        """``-Q_uu^-1`` on flattened parameters (B, r, m)."""
        named = self.as_dict(rows)
        solved = self._metric.solve(tuple(named.values()))
        pieces = [p.flatten(2) * -rate for p, rate in zip(solved, self._metric.rates, strict=True)]
        return torch.cat(pieces, 2)


class Policies(Mapping[str, Policy]):
    """Every player's policy by module name, in forward order."""

    def __init__(self, policies: list[Policy]) -> None:
        self._by_name = {policy.name: policy for policy in policies}

    @classmethod
    def of(cls, sweep: Sweep) -> Policies:
        """The policies of a finished sweep, before its updates are applied."""
        return cls(
            [
                Policy(sweep, turn, tuple(p.detach().clone() for p in turn.player.params))
                for turn in sweep.turns
                if turn.metric is not None
            ]
        )

    def __getitem__(self, name: str) -> Policy:
        if name not in self._by_name:
            raise KeyError(
                f"no policy of {name!r} in the last step; there are {', '.join(self._by_name)} "
                "(optimizer.coverage() says why a layer has none)"
            )
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"Policies({', '.join(self._by_name)})"


def _part(sweep: Sweep, turn: Turn, i: int) -> _Part | None:
    batch = sweep.batches[i]
    trace = batch.traces.get(turn.player)
    if trace is None:
        return None
    v, k = turn.values[i]
    if isinstance(sweep, DenseSweep):
        link = next(e for e in sweep.batches[i].chain.links if e.player is turn.player)
        values = sweep.states.get(turn.player)
        mixed = sweep.mixed[turn.player][i] if turn.player in sweep.mixed else None

        def given() -> tuple[Tensor, Tensor]:
            if values is None:
                raise GraphError(
                    f"the input of layer {turn.player.name!r} is not differentiable: it has no V_x"
                )
            return values[i]

        return _Part(batch, trace, link.x, v, k, given, mixed)

    return _Part(batch, trace, trace.inputs[0], v, k, lambda: sweep.at_input(i, turn), None)


def _as_matrix(k: Tensor) -> Tensor:
    return k[:, None, None] if k.dim() == 1 else k


def _as_vector(v: Tensor) -> Tensor:
    return v[:, None] if v.dim() == 1 else v


def _as_column(v: Tensor) -> Tensor:
    return _as_vector(v).unsqueeze(-1)


def _as_rank(row: Tensor, part: _Part) -> Tensor:
    """Coefficients of one column for every sample, in the form the batch takes."""
    samples = part.trace.samples
    if part.batch.rank == 1:
        return row.expand(samples)
    return row.expand(samples, len(row))
