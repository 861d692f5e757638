"""A network as a chain of stages ``x_{t+1} = s_t(g_t(x_t, u_t))`` (Eq. 6 and 12).

One more forward pass is watched: a player's module is ``g_t``, and the parameter-free operations
between its output and the next player's input are ``s_t``, kept as a list that can be run again
at other points. A network is a chain where every operation reads the state of its own stage alone;
any other is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ocnopt.control.hooks import ModuleHook
from ocnopt.control.players import Player
from ocnopt.errors import GraphError
from ocnopt.layers.base import Params

__all__ = ["Chain", "Link", "replaced", "require_apart", "watch_chain"]

ELSEWHERE = "DDPNOpt with terminal='matched' or 'gauss-newton' takes any graph"


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor of the state among an operation's arguments."""

    number: int


@dataclass
class _Operation:
    function: Any
    arguments: list[Any]
    spec: TreeSpec
    results: list[tuple[int, int]]


@dataclass
class Link:
    """One stage: a player and the parameter-free operations behind it.

    Attributes:
        player: The player, whose module is g.
        x: State at its input, (rows, *).
        args: Further positional arguments of the module.
        kwargs: Its keyword arguments.
        h: Its output.
    """

    player: Player
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    h: Tensor
    _start: int
    _random: Tensor
    _device_random: Tensor | None
    _operations: list[_Operation] = field(default_factory=list)
    _end: int = -1
    _view: tuple[torch.Size, tuple[int, ...], int] | None = None

    @property
    def parameter_free(self) -> bool:
        """Whether the next state is this player's output itself."""
        return not self._operations and self._view is None

    def g(self, x: Tensor, params: Params | None = None) -> Tensor:
        """The player's module at another input and with other parameters.

        Args:
            x: Shaped as the recorded input.
            params: Aligned with the player's; None for its own.
        """
        with replaced(self.player, params):
            return self.player.module.forward(x, *self.args, **self.kwargs)  # type: ignore[no-any-return]

    def s(self, h: Tensor) -> Tensor:
        """The operations between this player and the next (or the cost), at another output h.

        Random ones draw what they drew when they were recorded.
        """
        if not self._operations:
            return h if self._view is None else h.as_strided(*self._view)
        known = {self._start: h.clone()}  # the first operation may work in place
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        if self._device_random is not None:
            device_before = torch.cuda.get_rng_state(h.device)
            torch.cuda.set_rng_state(self._device_random, h.device)
        try:
            for operation in self._operations:
                arguments = [
                    known[a.number] if isinstance(a, _Slot) else a for a in operation.arguments
                ]
                args, kwargs = tree_unflatten(arguments, operation.spec)
                flat, _ = tree_flatten(operation.function(*args, **kwargs))
                for position, number in operation.results:
                    known[number] = flat[position]
        finally:
            torch.set_rng_state(before)
            if self._device_random is not None:
                torch.cuda.set_rng_state(device_before, h.device)
        end = known[self._end]
        return end if self._view is None else end.as_strided(*self._view)

    def f(self, x: Tensor, params: Params | None = None) -> Tensor:
        """The stage's dynamics ``f_t(x, u) = s_t(g_t(x, u))``."""
        return self.s(self.g(x, params))


@dataclass
class Chain:
    """The stages of a network at one batch, first to last.

    Attributes:
        links: The stages.
        output: The network's output.
    """

    links: list[Link]
    output: Tensor

    def seen_as(self, view: Tensor, result: Tensor) -> None:
        """Let the last stage end in a view of the output.

        Args:
            view: What the criterion was called on.
            result: The network's output in that pass.

        Raises:
            GraphError: It was no view of it.
        """
        if view is result or (
            view.shape == result.shape
            and view.stride() == result.stride()
            and view.storage_offset() == result.storage_offset()
        ):
            return
        same = view.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
        if not same or self.output.stride() != result.stride():
            raise GraphError(
                "the loop does more to the model's output than view it before it calls the "
                f"criterion, so the last stage is unknown; move that into the model ({ELSEWHERE})"
            )
        self.links[-1]._view = (view.shape, view.stride(), int(view.storage_offset()))


class watch_chain(TorchFunctionMode):
    """A context in which the model's forward is run once and becomes a :class:`Chain`.

    Args:
        players: The model's players; those that are called become stages.

    Raises:
        GraphError: From :meth:`chain`, or while the model runs: it is no chain.
    """

    def __init__(self, players: list[Player]) -> None:
        super().__init__()
        self._players = players
        # By id: the layer whose weights a tensor is, or was made of, and the tensor.
        self._owned: dict[int, tuple[str, weakref.ref[Tensor]]] = {
            id(p): (player.name or "(model)", weakref.ref(p))
            for player in players
            for p in player.params
        }
        self._entered: Tensor | None = None
        self._links: list[Link] = []
        self._paused = 0
        self._count = 0
        # By id: the tensor, its number, and the stage whose state it belongs to.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> watch_chain:
        for player in self._players:
            start = _Start(self, player)
            self._handles.append(
                player.module.register_forward_pre_hook(start, with_kwargs=True, prepend=True)
            )
            self._handles.append(
                player.module.register_forward_hook(start.end, with_kwargs=True, always_call=True)
            )
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        read = [self._slot(x) for x in flat]
        result = func(*args, **kwargs)
        of_weights = next((name for x in flat if (name := self._weights_in(x))), "")
        if any(slot is not None for slot in read):
            if of_weights and func is not Tensor.type_as:
                raise GraphError(
                    f"the weights of layer {of_weights!r} are used outside its own call, so the "
                    f"network is no chain; {ELSEWHERE}"
                )
            self._note(func, flat, read, spec, result)
        elif of_weights and isinstance(result, Tensor):
            self._owned[id(result)] = (of_weights, weakref.ref(result))
        return result

    def _weights_in(self, x: Any) -> str:
        """The layer whose weights a tensor is, or was made of; nothing for others."""
        name, known = self._owned.get(id(x), ("", None))
        return name if known is not None and known() is x else ""

    def _slot(self, x: Any) -> _Slot | None:
        """The slot of a tensor of the present state.

        Raises:
            GraphError: It belongs to an earlier stage.
        """
        known = self._known.get(id(x)) if isinstance(x, Tensor) else None
        if known is None or known[0]() is not x:
            return None
        if known[2] < len(self._links) - 1:
            here = self._links[-1].player.name
            raise GraphError(
                f"the network is no chain: after layer {here!r} it reads a tensor made before it "
                f"(after layer {self._links[known[2]].player.name!r}); {ELSEWHERE}"
            )
        return _Slot(known[1])

    def _note(
        self, func: Any, flat: list[Any], read: list[_Slot | None], spec: TreeSpec, result: Any
    ) -> None:
        outs, _ = tree_flatten(result)
        tensors = [(i, x) for i, x in enumerate(outs) if isinstance(x, Tensor)]
        if not tensors:
            name = resolve_name(func) or ""
            if "__set" in name:
                raise GraphError(
                    f"after layer {self._links[-1].player.name!r} a part of a tensor is assigned "
                    f"to, which cannot be run again; use torch.cat or torch.where ({ELSEWHERE})"
                )
            return  # a shape, a device: no part of the state
        arguments = [x if slot is None else slot for x, slot in zip(flat, read, strict=True)]
        results = [(i, self._number(x)) for i, x in tensors]
        self._links[-1]._operations.append(_Operation(func, arguments, spec, results))

    def _number(self, x: Tensor) -> int:
        self._count += 1
        self._known[id(x)] = (weakref.ref(x), self._count, len(self._links) - 1)
        return self._count

    def start(self, player: Player, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A player's module is called."""
        self._paused += 1
        if self._paused > 1:
            raise GraphError(
                f"layer {player.name!r} is called inside another layer, so the network is no "
                f"chain; {ELSEWHERE}"
            )
        for link in self._links:
            if link.player is player:
                raise GraphError(
                    f"layer {player.name!r} is called twice, so the network is no chain; "
                    f"{ELSEWHERE}"
                )
        if not args or not isinstance(args[0], Tensor):
            raise GraphError(
                f"the first positional argument of layer {player.name!r} is not a tensor; "
                f"{ELSEWHERE}"
            )
        self._entered = args[0]
        if self._links:
            slot = self._slot(args[0])
            if slot is None:
                raise GraphError(
                    f"layer {player.name!r} does not read what layer "
                    f"{self._links[-1].player.name!r} made, so the network is no chain; {ELSEWHERE}"
                )
            self._links[-1]._end = slot.number

    def end(
        self, player: Player, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Its call is over."""
        if not isinstance(output, Tensor):  # it raised
            self._paused -= 1
            return
        changed = args[0] is not self._entered
        if not changed and _hooked(player.module):
            again = player.module.forward(*args, **kwargs)
            changed = not torch.equal(again, output)
        if changed:
            raise GraphError(
                f"a hook of layer {player.name!r} changes its input or its output, which belongs "
                f"to no stage; do that in a module of its own ({ELSEWHERE})"
            )
        self._links.append(
            Link(
                player,
                args[0].detach(),
                args[1:],
                kwargs,
                output.detach().clone(),
                0,
                torch.get_rng_state(),
                torch.cuda.get_rng_state(output.device) if output.is_cuda else None,
            )
        )
        self._links[-1]._start = self._number(output)
        self._paused -= 1

    def chain(self, output: Any) -> Chain:
        """What was seen.

        Args:
            output: What the model returned.

        Raises:
            GraphError: The model is no chain.
        """
        if not self._links:
            raise GraphError("no layer of the model was called, so there is nothing to control")
        slot = self._slot(output)
        if slot is None:
            if not isinstance(output, Tensor):
                raise GraphError(
                    f"the model returns a {type(output).__name__}, but the last stage must end in "
                    f"one tensor; {ELSEWHERE}"
                )
            raise GraphError(
                "the model returns a tensor that does not come from its last layer, "
                f"{self._links[-1].player.name!r}; {ELSEWHERE}"
            )
        self._links[-1]._end = slot.number
        return Chain(self._links, output.detach())


class _Start:
    """Both hooks of one player."""

    def __init__(self, watch: watch_chain, player: Player) -> None:
        self.watch = watch
        self.player = player

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.watch.start(self.player, args, kwargs)

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.watch.end(self.player, args, kwargs, output)


def require_apart(model: nn.Module) -> None:
    """Raise where batch statistics tie the samples of a batch together.

    Raises:
        GraphError: A batch normalization uses its batch's own statistics.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or module.running_mean is None:
            raise GraphError(
                f"layer {name!r} normalizes by the statistics of its batch, so no sample has a "
                f"value function of its own; use eval() on it, or GroupNorm ({ELSEWHERE})"
            )


def _hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks that are not this package's."""
    own = (ModuleHook, _Start)
    return any(
        not isinstance(getattr(hook, "__self__", hook), own)
        for hook in module._forward_hooks.values()
    )


@contextmanager
def replaced(player: Player, params: Params | None) -> Iterator[None]:
    """The player's module with other tensors in place of its parameters."""
    if params is None:
        yield
        return
    table: dict[str, Any] = player.module._parameters
    own = {name: table[name] for name in player.layer.names}
    table.update(zip(player.layer.names, params, strict=True))
    try:
        yield
    finally:
        table.update(own)
