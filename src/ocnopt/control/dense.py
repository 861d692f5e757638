"""A batch whose value function is kept as matrices: V_x and V_xx per sample, on a chain.

At a player's output h the columns of the coefficient form (:mod:`ocnopt.control.bellman`) are the
unit vectors, so its coefficients are the value's derivatives themselves: ``v = V_h`` (B, n) and
``K = V_hh`` (B, n, n).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ocnopt.control.affine import AFFINE
from ocnopt.control.batch import Batch
from ocnopt.control.chain import Chain
from ocnopt.control.passes import TerminalCall
from ocnopt.control.players import Player
from ocnopt.control.room import room
from ocnopt.control.terminal import TerminalCost
from ocnopt.control.trace import ALL, Trace
from ocnopt.control.transport import Same, Transport, layer_jacobian, state_jacobian, unit_columns
from ocnopt.curvature.metric import Metric, to_float
from ocnopt.errors import GraphError
from ocnopt.layers.base import Params

__all__ = ["DenseBatch", "DenseTrace", "dense_batch"]


class DenseTrace(Trace):
    """A player whose columns are the unit vectors of its own output.

    Args:
        trace: What was recorded of it.
    """

    def __init__(self, trace: Trace) -> None:
        self.player = trace.player
        self.layer = trace.layer
        self.samples = trace.samples
        self.dtype = trace.dtype
        self.single = False
        self.inputs = trace.inputs
        self.gradients = None
        (self.a,) = trace.features
        (self.fold,) = trace.folds
        self.signal = trace.columns[0][0]  # dL/dh as recorded
        self.size = self.signal.numel() // self.samples

    def shape(self, signals: Tensor) -> Tensor:
        """Values (B, n) in the form of the player's output."""
        return signals.to(self.signal.dtype).reshape(self.signal.shape)

    def weighted(self, coefficients: Tensor) -> Params:
        """``sum_i g_u^T c^(i)`` for c of shape (B, n)."""
        return self.layer.gradient(self.a, self.shape(coefficients))

    def add_weighted(
        self, base: Params, coefficients: Tensor, scale: float, factor: float = 1.0
    ) -> Params:
        """``factor * base + scale * weighted(coefficients)``."""
        return self.layer.add_gradient(base, self.a, self.shape(coefficients), scale, factor)

    def dots(self, delta: Params) -> Tensor:
        """``g(x; delta)``, (B, n)."""
        return self.layer.apply(self.a, delta).reshape(self.samples, -1).to(self.dtype)

    def units(self) -> Tensor:
        """Unit columns (n, rows, *)."""
        return unit_columns(self.signal, self.size, self.samples)

    def sample_columns(self, part: slice = ALL) -> Params:
        """``g_u^T`` of every sample, (B, n, *parameter) each; always of all."""
        assert part is ALL
        return self.layer.column_gradients(self.a, self.units(), self.fold)

    def gram(self, metric: Metric) -> Tensor:
        """``g_u Q_uu^-1 g_u^T`` with ``Q_uu = M / eta``, (B, n, n)."""
        return self.layer.gram(self.a, self.units(), metric, self.fold).to(self.dtype)

    def ratio(self, open_loop: Tensor, feedback: Tensor) -> Tensor:
        """Norm of a signal relative to another's, (B,)."""
        size = feedback.norm(dim=1)
        return torch.where(size == 0, size, size / open_loop.norm(dim=1))

    def rows(self) -> Tensor:
        """Inputs for Kronecker factors, as in :class:`Trace`."""
        return self._by_sample(self.layer.rows(self.a))

    def cols(self, coefficients: Tensor) -> Tensor:
        """Signals for Kronecker factors, as in :class:`Trace`."""
        return self._by_sample(self.layer.cols(self.shape(coefficients)))

    def _by_sample(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.samples, -1, *rows.shape[2:])

    def input_key(self) -> Hashable:
        """Its own: a chain's players read different tensors."""
        return id(self)


class DenseBatch(Batch):
    """A batch whose coefficients are the value's derivatives themselves.

    Args:
        batch: The recorded samples.
        chain: The network at this batch.
        v: Gradient of a sample's own cost in the network's output, (B, n).
        k: Its Hessian, (B, n, n).
    """

    def __init__(self, batch: Batch, chain: Chain, v: Tensor, k: Tensor) -> None:
        traces: dict[Player, Trace] = {p: DenseTrace(t) for p, t in batch.traces.items()}
        super().__init__(batch.samples, batch.weight, batch.lift, v, k, traces, batch.skipped)
        self.source, self.processes = batch.source, batch.processes
        self.chain = chain
        #: Jacobians of the links' operations and layers, first to last.
        self.s: list[Transport] = []
        self.g: list[Transport] = []

    @property
    def rank(self) -> int:
        """Zero: there are no coefficients, however few outputs the network has."""
        return 0

    def linearise(self, to_input: bool) -> None:
        """Form the Jacobians of all links.

        Args:
            to_input: Whether that of the first player's layer is asked for, too.
        """
        for i, link in enumerate(self.chain.links):
            self.s.append(state_jacobian(link, self.samples, self.v.dtype))
            wanted = i > 0 or (to_input and link.x.is_floating_point())
            dtype = self.v.dtype
            self.g.append(layer_jacobian(link, self.samples, dtype) if wanted else Same())

    def own(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def own_gram(self, s: Tensor) -> Tensor:
        """As it is."""
        return s

    def signal_weights(self, x: Tensor) -> Tensor:
        """Signals of the process's loss."""
        return x * self._in_process()

    def signal_own(self, x: Tensor) -> Tensor:
        """As they are."""
        return x

    def signal_of(self, player: Player) -> Tensor:
        """The recorded gradient at a player's output, (B, n)."""
        trace = self.traces[player]
        assert isinstance(trace, DenseTrace)
        return trace.signal.reshape(self.samples, -1).to(self.v.dtype)

    def gradient_values(self, player: Player) -> Tensor:
        """The gradient of the sample's own cost."""
        lift = self.lift if isinstance(self.lift, float) else self.lift[:, None]
        return self.signal_of(player) * lift

    def baseline(self, player: Player) -> Tensor:
        """The recorded gradient."""
        return self.signal_of(player)


def dense_batch(
    batch: Batch,
    chain: Chain,
    calls: list[TerminalCall],
    terminal: TerminalCost,
    order: int,
    to_input: bool = False,
) -> DenseBatch:
    """Check that the full form fits and is defined; give the terminal values.

    Args:
        batch: The recorded samples.
        chain: The network at this batch.
        calls: Calls of the criterion.
        terminal: The terminal cost.
        order: Of the expansion of the dynamics.
        to_input: Whether V_x at the first player's input is asked for.

    Raises:
        GraphError: It is not defined, or does not fit into memory.
    """
    if len(calls) != 1:
        raise GraphError(
            f"terminal='full' needs one call of the criterion on the model's output, but there "
            f"were {len(calls)}; use terminal='gauss-newton'"
        )
    if batch.skipped:
        player, why = next(iter(batch.skipped.items()))
        raise GraphError(
            f"terminal='full' is not defined for layer {player.name!r}: {why}; use "
            "terminal='matched'"
        )
    if order == 2:
        for link in chain.links:
            kind = link.player.layer.kind
            if kind not in AFFINE:
                raise GraphError(
                    f"dynamics_order=2 is defined for Linear and convolution layers, but "
                    f"{link.player.name!r} is {kind}; use dynamics_order=1, or freeze it"
                )
    _require_room(batch.samples, chain, order)
    v, k = terminal.expansion(calls[0], batch.samples)
    lift = batch.lift
    own = calls[0].scale * lift if calls[0].scale is not None else 0.0
    own = torch.as_tensor(own, dtype=batch.v.dtype, device=batch.v.device)
    if own.dim():
        own = own.reshape(batch.samples, -1)[:, 0]
    own = own.expand(batch.samples)
    up = (own > 0).to(own.dtype)
    dense = DenseBatch(
        batch,
        chain,
        v.to(own.dtype) * own[:, None],
        k.to(own.dtype) * (own * up)[:, None, None],
    )
    dense.linearise(to_input)
    return dense


def _require_room(samples: int, chain: Chain, order: int) -> None:
    """Raise unless the largest stage's matrices fit into memory."""
    links = chain.links
    size = torch.empty((), dtype=to_float(links[0].h.dtype)).element_size()
    kept, worst, largest = 0, 0, links[0]
    for i, link in enumerate(links):
        n, h = (link.x.numel() // samples if i else 0), link.h.numel() // samples
        following = links[i + 1].x.numel() // samples if i + 1 < len(links) else h
        kept += n * h + h * following  # Jacobians, dense at worst
        entries = 4 * max(n, h) ** 2
        if order == 2:
            entries += 2 * (n + h + 1) * link.player.layer.numel
        if entries > worst:
            worst, largest = entries, link
    need = samples * (kept + worst) * size
    available = room(links[0].x.device)
    if need > available:
        raise GraphError(
            f"terminal='full' would take about {need / 2**30:.1f} GiB for V_xx and the Jacobians "
            f"at layer {largest.player.name!r} ({largest.h.numel() // samples} outputs per sample, "
            f"{samples} samples), and {available / 2**30:.1f} GiB are at hand; use "
            "terminal='matched' or 'gauss-newton', or a smaller batch"
        )
