"""What was recorded of one forward pass: calls of layers, calls of the criterion."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ocnopt.control.players import Player
from ocnopt.errors import RecordingError
from ocnopt.layers.base import Params, add_all

if TYPE_CHECKING:
    from ocnopt.control.replay import Casts, Setting
    from ocnopt.control.tape import Tape

__all__ = ["Arrivals", "HasColumns", "Pass", "TerminalCall", "Use", "count_samples"]


class Arrivals:
    """Gradients that reached a tensor, by the backward pass that brought them.

    A user's own ``torch.autograd.grad`` passes the same tensors as the ``backward`` that fills
    ``.grad``; only the latter counts, and which one it was is known when it is over.
    """

    __slots__ = ("grads",)

    def __init__(self) -> None:
        self.grads: list[tuple[int, Tensor]] = []

    def __call__(self, grad: Tensor) -> None:
        """Tensor hook."""
        self.grads.append((torch._C._current_graph_task_id(), grad.detach()))

    def total(self, tasks: set[int]) -> Tensor | None:
        """Sum of what the given backward passes brought."""
        found: Tensor | None = None
        for task, grad in self.grads:
            if task in tasks:
                found = grad if found is None else found + grad
        return found


class HasColumns(Protocol):
    """Anything that back-propagated terminal columns can be stored in."""

    columns: list[Tensor | None]


class Use:
    """One call of one player's module.

    Attributes:
        player: The player.
        order: Position among all recorded calls.
        rows: First dimension of the output; 0 where the call had no batch dimension.
        dims: Dimensions of the output.
        capture: What the layer kind kept of the call; let go, an empty tuple, with the signal.
        signal: dL/dh, back-propagated from the loss as it was scaled; shape of h.
        columns: Back-propagated columns of the terminal Hessian's factor, unscaled.
        gradients: Weight gradients of every row, formed as the signal arrived where they take less
            room than it; then ``signal`` is None.
        locations: Locations per row that these were summed over.
    """

    __slots__ = (
        "__weakref__",
        "capture",
        "columns",
        "dims",
        "gradients",
        "locations",
        "order",
        "owner",
        "pending",
        "player",
        "rows",
        "signal",
        "task",
        "version",
    )

    def __init__(
        self,
        player: Player,
        order: int,
        rows: int,
        dims: int,
        capture: tuple[Any, ...],
        owner: Pass,
    ) -> None:
        self.player = player
        self.order = order
        self.rows = rows
        self.dims = dims
        self.capture = capture
        self.version = capture[0]._version
        self.owner = owner
        self.signal: Tensor | None = None
        self.pending: Tensor | None = None
        self.task = -1
        self.columns: list[Tensor | None] = []
        self.gradients: Params | None = None
        self.locations = 0

    def require_untouched(self) -> None:
        """Raise unless the input is still what the forward pass saw.

        Raises:
            RecordingError: It was written into.
        """
        if self.capture[0]._version != self.version:
            raise RecordingError(
                f"the input of layer {self.player.name!r} was changed in place after its forward "
                "pass; use an out-of-place operation there, or call step() before the change"
            )

    def forget(self) -> None:
        """Let go of what has arrived: it was thrown away."""
        self.signal = self.gradients = None
        self.locations = 0

    def accept(self, signal: Tensor, compact: bool) -> bool:
        """Keep a signal, or the weight gradients it makes.

        Args:
            signal: dL/dh.
            compact: Whether weight gradients may stand for it.

        Returns:
            Whether this was the first.
        """
        first = self.signal is None and self.gradients is None
        if not self.capture:
            raise RecordingError(
                f"another gradient reached layer {self.player.name!r} after its graph was let go; "
                "call the first backward() with retain_graph=True"
            )
        if compact and self.rows:
            layer, dtype = self.player.layer, self.player.params[0].dtype
            with torch.no_grad():
                a = layer.features(self.capture, dtype)
                g = signal if signal.dtype == dtype else signal.to(dtype)
                if layer.prefers_samples(a, g):
                    self.require_untouched()
                    formed = layer.sample_gradients(a, g)
                    known = self.gradients
                    self.gradients = formed if known is None else add_all([known, formed])
                    self.locations = layer.cols(g).shape[1] if layer.kronecker else 0
                    if not torch._C._autograd._get_current_graph_task_keep_graph():
                        self.capture = ()  # nothing more can arrive
                    return first
        self.signal = signal if self.signal is None else self.signal + signal
        return first


class TerminalCall:
    """One call of the criterion: its inputs and how the loss was scaled afterwards.

    Attributes:
        output: The criterion's first argument, detached.
        args: Its further arguments.
        kwargs: Its keyword arguments.
        loss: The loss, detached.
        scale: d(total)/d(loss): 1, or 1/k where the loss was divided by k; None where the loss
            took no part in the gradients.
    """

    def __init__(
        self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        self.output = output
        self.args = args
        self.kwargs = kwargs
        self.loss = loss
        self.scale: Tensor | None = None
        #: Samples, or samples times what each has many of.
        self.rows = output.shape[0] if output.dim() else 0
        #: Whether the loop picked rows by index or mask before the call.
        self.picked = False
        self.arrivals = Arrivals()


class Pass:
    """One forward pass of the model with its calls of the criterion."""

    def __init__(self) -> None:
        self.received: list[Use] = []
        self.calls: list[TerminalCall] = []
        self.edges: list[tuple[HasColumns, GradientEdge]] = []
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.result: Tensor | None = None
        self.setting: Setting | None = None
        #: Autocast as the model's forward began.
        self.autocast: Casts = ()
        self.tape: Tape | None = None
        self.forwards = 0
        #: Players whose signals are kept as they are; None before a gradient arrives.
        self.whole: frozenset[Player] | None = None
        #: Samples that columns were made for.
        self.samples = 0
        self.first: weakref.ref[Use] | None = None
        #: Backward passes that accumulated gradients.
        self.tasks: set[int] = set()

    def abandoned(self) -> bool:
        """Whether the graph of the first call is gone, so that no gradient can arrive."""
        return self.first is not None and self.first() is None

    def let_go(self) -> None:
        """Drop the graph's edges: through its hooks the graph knows the pass, a cycle."""
        self.edges = []
        if self.tape is not None:
            self.tape.new_edges = []

    def forget(self) -> None:
        """Take back what backward passes have brought: another may come."""
        for use in self.received:
            use.forget()
        self.received, self.tasks, self.whole = [], set(), None

    def close(self) -> None:
        """Let go of the calls, which know the pass: what they hold is freed with the step."""
        self.received = []

    def settle(self) -> None:
        """Add up what the backward passes that count have brought."""
        for call in self.calls:
            call.scale = call.arrivals.total(self.tasks)
        if self.tape is not None:
            for edge in self.tape.edges:
                edge.signal = edge.arrivals.total(self.tasks)

    def uses(self) -> dict[Player, list[Use]]:
        """Calls whose gradient arrived, per player, players in the order of their first call."""
        table: dict[Player, list[Use]] = {}
        for use in sorted(self.received, key=lambda u: u.order):
            table.setdefault(use.player, []).append(use)
        return table


def count_samples(uses: list[Use], calls: list[TerminalCall]) -> int:
    """B: the most common first dimension of the players' outputs that divides the criterion's.

    Returns:
        The number of samples, or 0 where the two do not agree.
    """
    rows = calls[0].rows if calls else 0
    sizes = Counter(use.rows for use in uses if use.rows)
    for size, _ in sizes.most_common():
        if rows % size == 0:
            return size
    if rows and all(size % rows == 0 for size in sizes):
        return rows  # several consecutive rows of every layer make one sample (multiple choice)
    return 0
