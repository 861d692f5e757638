"""Records what one training pass did: layer inputs and back-propagated vectors.

Forward hooks on the players keep a layer's input; a tensor hook on its output waits for the
gradient, so an in-place activation behind the layer is harmless. Everything a pass holds belongs
to its own autograd graph until the gradient arrives: a pass that is never differentiated leaves
nothing behind. Hooks know the recorder only weakly: they die with the optimizer and turn inert in
a copy of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ocnopt.control.hooks import Anchored, GradHook, ModuleHook, Receiver
from ocnopt.control.passes import Pass, TerminalCall, Use, count_samples
from ocnopt.control.players import Player
from ocnopt.control.replay import autocast_now
from ocnopt.control.sampled import sample_of, thrown_away
from ocnopt.control.terminal import TerminalCost
from ocnopt.errors import RecordingError

__all__ = ["Recorder"]


class Recorder:
    """Hooks on a model and its criterion, and the passes they recorded since the last step.

    Args:
        model: The model; its own forward marks where a pass begins.
        players: Its players.
        criterion: The module the loop calls, or None.
        terminal: Returns factor columns of the terminal Hessian that are to be back-propagated,
            or None where the ordinary backward pass is all that is needed.
        on_forward: Called with the pass when the model's forward begins (for replays), or None.
        keep_grad: Whether autograd forms the players' weight gradients. If not, their parameters
            are hidden from it while their modules run, and ``.grad`` stays None.
        compact: Whether signals may be turned into per-sample weight gradients as they arrive.
        whole: Returns the players whose signals are needed all the same, such as for Kronecker
            factors, in the step that comes.
    """

    def __init__(
        self,
        model: nn.Module,
        players: list[Player],
        criterion: nn.Module | None,
        terminal: TerminalCost | None,
        on_forward: Callable[[Pass], None] | None = None,
        keep_grad: bool = True,
        compact: bool = False,
        whole: Callable[[], frozenset[Player]] = frozenset,
    ) -> None:
        self.players = players
        self.compact = compact
        self.whole = whole
        self.keep_grad = keep_grad
        self._hidden: list[list[Tensor]] = [[] for _ in players]
        self._anchor = torch.zeros((), requires_grad=True)
        self.terminal = terminal
        self.on_forward = on_forward
        self.active = True
        self.passes: list[Pass] = []
        self.current: Pass | None = None
        #: Why the last call of the criterion could not be used.
        self.ignored = ""
        #: A few entries of every player's gradients, as autograd accumulated them.
        self.samples: dict[Tensor, Tensor] = {}
        self._order = 0
        self._task = -1
        self._pending: list[list[Use]] = [[] for _ in players]
        self._handles: list[Any] = [
            model.register_forward_pre_hook(ModuleHook(self, "begin"), with_kwargs=True),
        ]
        for player in players:
            hook = ModuleHook(self, "record", player.index)
            self._handles.append(
                player.module.register_forward_hook(
                    hook, prepend=True, with_kwargs=True, always_call=not keep_grad
                )
            )
            if not keep_grad:
                hide = ModuleHook(self, "hide", player.index)
                self._handles.append(
                    player.module.register_forward_pre_hook(hide, with_kwargs=True)
                )
                continue
            grad_hook = GradHook(self, player.index)
            for param in player.params:
                self._handles.append(param.register_post_accumulate_grad_hook(grad_hook))
        if on_forward is not None:
            end = ModuleHook(self, "end")
            self._handles.append(model.register_forward_hook(end, with_kwargs=True))
        if criterion is not None:
            hook = ModuleHook(self, "finish")
            self._handles.append(criterion.register_forward_hook(hook, with_kwargs=True))
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def remove(self) -> None:
        """Take every hook off the model, its parameters and the criterion."""
        self._finalizer()
        self.clear()

    # forward

    def begin(self, _: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """The model's forward begins."""
        current = self.current
        if current is None or current.calls or current.received or current.abandoned():
            current = self._open()
        current.forwards += 1
        current.inputs = (args, kwargs)
        current.autocast = autocast_now()
        if self.on_forward is not None:
            self.on_forward(current)

    def end(
        self, _: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """The model's forward ends."""
        if self.current is not None and isinstance(output, Tensor):
            self.current.result = output.detach()

    def _open(self) -> Pass:
        # Gradients set to None are seen at once: the next pass needs the room.
        if all(param.grad is None for player in self.players for param in player.params):
            self._forget_thrown_away()
        if self.current is not None:
            self.current.let_go()
        self.current = Pass()
        return self.current

    def _forget_thrown_away(self) -> None:
        """Forget passes whose gradients the loop has thrown away: set to None or to zero.

        A skipped batch, ``model.zero_grad``: gradients no longer hold what the passes put there.
        """
        if not (self.keep_grad and self.passes):
            return
        players = {use.player for recorded in self.passes for use in recorded.received}
        if thrown_away((p for player in players for p in player.params), self.samples):
            self.forget()

    def hide(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """A player's module is about to be called: its weight gradient is ours to form."""
        hidden: list[Tensor] = [p for p in self.players[index].params if p.requires_grad]
        for param in hidden:
            param.requires_grad_(False)
        self._hidden[index] = hidden

    def record(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Tensor | None:
        """A player's module was called."""
        replaced: Tensor | None = None
        if self._hidden[index]:
            for param in self._hidden[index]:
                param.requires_grad_(True)
            self._hidden[index] = []
            if isinstance(output, Tensor) and not output.requires_grad:
                output = replaced = Anchored.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        current = self.current
        if current is None or current.received:
            current = self._open()
        player = self.players[index]
        self._order += 1
        tape = current.tape
        if tape is not None:
            tape.paused = True
        rows = output.shape[0] if output.dim() > 1 else 0
        capture = player.layer.capture(module, args, kwargs)
        use = Use(player, self._order, rows, output.dim(), capture, current)
        if current.first is None:
            current.first = weakref.ref(use)
        if self.terminal is not None and self.terminal.rank_r:
            current.edges.append((use, get_gradient_edge(output)))
        output.register_hook(Receiver(use, weakref.ref(self)))
        if tape is not None:
            tape.paused = False
        return replaced

    def finish(
        self, _: int, criterion: nn.Module, args: tuple[Any, ...], kwargs: Any, loss: Any
    ) -> None:
        """The criterion was called."""
        if not isinstance(loss, Tensor):
            self.ignored = f"it returned a {type(loss).__name__}, not a tensor"
            return
        if not loss.requires_grad:
            return
        current = self.current if self.current is not None else self._open()
        if args:
            output, args = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            output = kwargs.pop("input", None)
        if not isinstance(output, Tensor):
            self.ignored = "its first argument, or the one named input, is not a tensor"
            return
        if not output.requires_grad:
            raise RecordingError(
                f"the first argument of {type(criterion).__name__} carries no gradient, but its "
                "value does; call criterion(output, target), in this order"
            )
        call = TerminalCall(output.detach(), args, kwargs, loss.detach())
        if isinstance(criterion, nn.CTCLoss) and output.dim() == 3:
            call.rows = output.shape[1]  # dimension 0 is time
        call.picked = output.grad_fn is not None and output.grad_fn.name().startswith("Index")
        current.calls.append(call)
        loss.register_hook(call.arrivals)
        if current.tape is not None:
            current.edges.extend(current.tape.new_edges)
            current.tape.new_edges = []
        if self.terminal is not None and self.terminal.rank_r and current.edges:
            self._propagate_columns(self.terminal, current, call, output)

    def _propagate_columns(
        self, terminal: TerminalCost, current: Pass, call: TerminalCall, output: Tensor
    ) -> None:
        """Back-propagate the terminal factor's columns: r ordinary vector products."""
        self.active = False
        try:
            edges = [edge for _, edge in current.edges]
            uses = [use for use, _ in current.edges if isinstance(use, Use)]
            samples = current.samples = count_samples(uses, [call])
            for column in terminal.columns(call, samples) if samples else ():
                found = _columns(output, edges, column)
                for (use, _), value in zip(current.edges, found, strict=True):
                    use.columns.append(None if value is None else value.detach())
        finally:
            self.active = True

    # backward

    def receive(self, use: Use, grad: Tensor) -> None:
        """The gradient of a call's output arrived; not yet known whether a weight gets it."""
        if not self.active:
            return
        # The edges keep the graph alive. A second call of the criterion in the same pass needs
        # them too, so they go when the gradient arrives.
        use.owner.let_go()
        use.pending = grad.detach()
        use.task = torch._C._current_graph_task_id()
        if use.task != self._task:  # a backward pass begins, and has accumulated nothing yet
            self._task = use.task
            self._forget_thrown_away()
        self._pending[use.player.index].append(use)
        if not self.keep_grad:
            self._settle(use.player.index)

    def commit(self, index: int, param: Tensor) -> None:
        """A player's parameter accumulated its gradient: what it received counts."""
        self.samples[param] = sample_of(param)
        self._settle(index)

    def _settle(self, index: int) -> None:
        waiting = self._pending[index]
        if not waiting:
            return
        self._pending[index] = []
        task = torch._C._current_graph_task_id()
        for use in waiting:
            if use.pending is None or use.task != task:
                use.pending = None
                continue
            owner = use.owner
            owner.tasks.add(task)
            if self.compact and owner.whole is None:
                owner.whole = self.whole()
            compact = owner.whole is not None and use.player not in owner.whole
            if use.accept(use.pending, compact):
                owner.received.append(use)
                if len(owner.received) == 1:
                    self.passes.append(owner)
            use.pending = None

    # step

    def take(self) -> list[Pass]:
        """The passes recorded since the last call, which are then forgotten."""
        taken = self.passes
        self.clear()
        for recorded in taken:
            recorded.settle()
        return taken

    def forget(self) -> None:
        """As :meth:`clear`, of passes that a graph that was kept may bring gradients to again."""
        for recorded in self.passes:
            recorded.forget()
        self.clear()

    def clear(self) -> None:
        """Forget every pass that was differentiated; one that is under way goes on."""
        self.passes = []
        current = self.current
        if current is not None and current.received:
            current.let_go()
            self.current = None
        elif current is not None and current.calls:
            current.let_go()  # its columns are known
        self._pending = [[] for _ in self.players]


def _columns(output: Tensor, edges: list[Any], column: Tensor) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(output, edges, column, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise RecordingError(
            "terminal='gauss-newton' goes back through a pass several times, which compiled code "
            "allows with torch._functorch.config.donated_buffer = False alone; set it before the "
            "first forward pass, or use terminal='bounded'"
        ) from error


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
