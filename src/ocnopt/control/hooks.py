"""The hooks that connect a model to its recorder, and that a copy of the model does not inherit."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ocnopt.control.passes import Use

if TYPE_CHECKING:
    from ocnopt.control.record import Recorder

__all__ = [
    "Anchored",
    "Committed",
    "GradHook",
    "ModuleHook",
    "Receiver",
    "Untraced",
    "untraced",
]


class Untraced(ABC):
    """What torch.compile must not trace: it notes real tensors, and what this very pass did.

    Traced, that would be noted once (the version of an input, that no gradient had come yet) and
    taken for true ever after. So compiled code leaves its graph to call :meth:`run`.
    """

    __slots__ = ()

    #: Whether compiled code has come upon one; from then on dynamo may be at work around any.
    met: ClassVar[bool] = False
    #: Name of the method that is called from outside.
    entry: ClassVar[str] = "__call__"

    @abstractmethod
    def run(self, args: tuple[Any, ...]) -> Any:
        """What the entry does."""


@_disable_dynamo
def untraced(callee: Untraced, args: tuple[Any, ...]) -> Any:
    """Run something out of reach of torch.compile."""
    from torch._dynamo.eval_frame import skip_code  # slow to import where nothing is compiled

    Untraced.met = True
    # Called from behind a break, the entry would be compiled itself, anew for each kind of layer.
    skip_code(getattr(type(callee), callee.entry).__code__)
    return callee.run(args)


class ModuleHook(Untraced):
    """A hook that survives a deepcopy or pickle of its module as something that does nothing."""

    __slots__ = ("index", "recorder", "verb")

    def __init__(self, recorder: Recorder | None, verb: str, index: int = -1) -> None:
        self.recorder = (lambda: None) if recorder is None else weakref.ref(recorder)
        self.verb = verb
        self.index = index

    def __call__(self, *args: Any) -> Any:
        """Pass the call on while gradients are recorded."""
        if torch.compiler.is_compiling():
            # Without gradients there is nothing to leave the compiled graph for.
            return untraced(self, args) if torch.is_grad_enabled() else None
        return untraced(self, args) if Untraced.met else self.run(args)

    def run(self, args: tuple[Any, ...]) -> Any:
        """As a call, as ordinary Python."""
        recorder = self.recorder()
        if recorder is None or not recorder.active or not torch.is_grad_enabled():
            return None
        if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # what is traced or transformed (torch.func) is no pass of the loop
        return getattr(recorder, self.verb)(self.index, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(None, self.verb)

    def __reduce__(self) -> tuple[type[ModuleHook], tuple[None, str]]:
        return ModuleHook, (None, self.verb)


class Committed(Protocol):
    """Who is told that autograd has accumulated a parameter's gradient."""

    active: bool

    def commit(self, index: int, param: Tensor) -> None:
        """A gradient of the player with that index is complete."""


class GradHook:
    """Commits what a player received once autograd has accumulated its parameter's gradient."""

    __slots__ = ("index", "recorder")

    def __init__(self, recorder: Committed, index: int) -> None:
        self.recorder = weakref.ref(recorder)
        self.index = index

    def __call__(self, param: Tensor) -> None:
        """Autograd accumulated a gradient."""
        recorder = self.recorder()
        if recorder is not None and recorder.active:
            recorder.commit(self.index, param)


class Receiver:
    """Tensor hook on a call's output; owns the call's record until the gradient arrives."""

    __slots__ = ("recorder", "use")

    def __init__(self, use: Use, recorder: weakref.ref[Recorder]) -> None:
        self.use = use
        self.recorder = recorder

    def __call__(self, grad: Tensor) -> None:
        """The gradient of the call's output arrived."""
        recorder = self.recorder()
        if recorder is not None:
            recorder.receive(self.use, grad)


class Anchored(torch.autograd.Function):
    """Makes a tensor that nothing before it differentiates part of the graph, at no cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        """The same tensor."""
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """Nothing."""
        return None, None
