"""The paper's nonlinear rollout: a second forward pass that watches the state differential.

While the model runs for the first time, every use of a tensor across the start of a player is an
edge of the graph: what crosses a player's start is the state ``x_t`` there, one tensor on a chain
and several where the network branches. Each edge keeps its value and, in the backward pass,
receives its own gradient ``P_e``. In the second pass, at the start of player t,
``rho_t = sum over the edges alive at t of P_e^T (xhat_e - x_e)``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ocnopt.control.batch import Batch
from ocnopt.control.hooks import Untraced, untraced
from ocnopt.control.passes import Arrivals
from ocnopt.control.players import Player
from ocnopt.errors import GraphError

__all__ = ["Tape"]


class Edge:
    """A tensor that is produced before a player's start and consumed after it.

    Attributes:
        number: Which of the pass's results the tensor is.
        born: Players started when it was produced.
        consumed: Players started when it was consumed.
        value: Its value in the first pass.
        signal: Gradient of the total loss through this use alone.
        columns: Terminal columns through this use alone.
    """

    __slots__ = ("arrivals", "born", "columns", "consumed", "number", "signal", "value", "version")

    def __init__(self, number: int, born: int, consumed: int, value: Tensor) -> None:
        self.number = number
        self.born = born
        self.consumed = consumed
        self.value = value.detach()
        self.version = value._version
        self.signal: Tensor | None = None
        self.arrivals = Arrivals()
        self.columns: list[Tensor | None] = []


class _Watch(TorchFunctionMode, Untraced):
    """Numbers the results of a pass; forks the uses that cross a player's start."""

    entry = "__torch_function__"

    def __init__(self, tape: Tape, forking: bool) -> None:
        super().__init__()
        self.tape = tape
        self.forking = forking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = (func, args, kwargs or {})
        if torch.compiler.is_compiling() or Untraced.met:
            return untraced(self, call)
        return self.run(call)

    def run(self, args: tuple[Any, ...]) -> Any:
        """A function of torch is called."""
        func, args, kwargs = args
        if self.tape.paused:
            return func(*args, **kwargs)
        if self.forking and torch.is_grad_enabled():
            flat, spec = tree_flatten((args, kwargs))
            forked = [self.tape.fork(x) if isinstance(x, Tensor) else x for x in flat]
            if any(a is not b for a, b in zip(flat, forked, strict=True)):
                args, kwargs = tree_unflatten(forked, spec)
        result = func(*args, **kwargs)
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                self.tape.born(x)
        return result


class Tape:
    """The edges of one forward pass, and where its players start.

    Args:
        model: The model whose forward is watched.
        players: Its players.
        columns: Whether terminal columns will be back-propagated to the edges.
    """

    def __init__(self, model: nn.Module, players: list[Player], columns: bool) -> None:
        self.columns = columns
        #: Set while hooks run that the second pass will not run.
        self.paused = False
        self.edges: list[Edge] = []
        self.starts: list[Player] = []
        self.needed: dict[int, Tensor] = {}
        self.on_start: Callable[[Player], None] | None = None
        self.new_edges: list[tuple[Edge, GradientEdge]] = []
        self._count = 0
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._mode: _Watch | None = None
        self._handles: list[Any] = []
        self._players = players
        self._wanted: set[int] = set()
        self._open(forking=True)
        end = _Hook(self._close)
        self._handles.append(model.register_forward_hook(end, always_call=True))

    def _open(self, forking: bool) -> None:
        self._count = 0
        self._numbers = {}
        self._started: set[Player] = set()
        self._mode = _Watch(self, forking)
        self._handles = [
            player.module.register_forward_pre_hook(_Hook(partial(self.start, player)))
            for player in self._players
        ]
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    @contextmanager
    def second_pass(self, on_start: Callable[[Player], None]) -> Iterator[None]:
        """Watch the model run again; ``on_start`` is called before a player's first call."""
        self._wanted = {edge.number for edge in self.edges}
        self.needed = {}
        self.on_start = on_start
        self._open(forking=False)
        try:
            yield
        finally:
            self._close()
            self.on_start = None

    def _close(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._numbers = {}

    def start(self, player: Player) -> None:
        """A player's module is called; its first call is its turn."""
        if player in self._started:
            return
        self._started.add(player)
        if self.on_start is not None:
            self.paused = True
            try:
                self.on_start(player)
            finally:
                self.paused = False
        else:
            self.starts.append(player)

    def born(self, x: Tensor) -> None:
        """A function returned x."""
        self._count += 1
        self._numbers[id(x)] = (weakref.ref(x), self._count, len(self._started))
        if self._count in self._wanted:
            self.needed[self._count] = x.detach()

    def fork(self, x: Tensor) -> Tensor:
        """An alias of x with a gradient of its own, where the use of x crosses a start."""
        known = self._numbers.get(id(x))
        if known is None or known[0]() is not x or not x.requires_grad:
            return x
        _, number, born = known
        stage = len(self._started)
        if born >= stage or not x.is_floating_point():
            return x
        edge = Edge(number, born, stage, x)
        self.edges.append(edge)
        alias = x.view_as(x)
        if self.columns:
            self.new_edges.append((edge, get_gradient_edge(alias)))
        alias.register_hook(edge.arrivals)
        return alias

    def rho(self, position: int, batch: Batch) -> Tensor | None:
        """Cost directions at the start of the player at ``position`` among all that started.

        Raises:
            GraphError: The state at that point cannot be told apart by sample.
        """
        total: Tensor | None = None
        for edge in self.edges:
            if not edge.born <= position < edge.consumed or edge.signal is None:
                continue
            new = self.needed.get(edge.number)
            if new is None or new.shape != edge.value.shape:
                raise GraphError(
                    "the second forward pass took another path than the first; use "
                    "rollout='linear', which needs none"
                )
            if edge.value._version != edge.version:
                raise GraphError(
                    f"a state of shape {tuple(new.shape)} was changed in place after its use; "
                    "use rollout='linear', or an out-of-place operation"
                )
            if new.dim() == 0 or new.shape[0] % batch.samples:
                raise GraphError(
                    f"a state of shape {tuple(new.shape)} does not have the {batch.samples} "
                    "samples on its first dimension; use rollout='linear'"
                )
            change = (new - edge.value).to(batch.v.dtype)
            columns = [edge.signal, *edge.columns]
            parts = [
                torch.zeros_like(batch.v[:, 0] if batch.rank > 1 else batch.v)
                if column is None
                else (column * change).reshape(batch.samples, -1).sum(-1).to(batch.v.dtype)
                for column in columns
            ]
            part = parts[0] if batch.rank == 1 else torch.stack(parts, 1)
            total = part if total is None else total + part
        return None if total is None else batch.own(total)


class _Hook(Untraced):
    """A hook of a module that calls a function without arguments."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or Untraced.met:
            untraced(self, ())
        else:
            self.run(())

    def run(self, args: tuple[Any, ...]) -> None:
        """As a call."""
        self.function()
