"""A model's forward as a graph that can be run piece by piece.

torch.fx reads the Python code and keeps player modules whole. Where it cannot (control flow on
values or shapes, as in ``nn.TransformerEncoderLayer``), torch.export runs the model on example
inputs and keeps the operations beneath the modules. A trace made with inputs is compared with the
model on them: symbolic tracing can take a wrong turn without noticing.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node, map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from ocnopt.control.effects import INPLACE_OPERATORS, overwrites
from ocnopt.control.players import Player, Solver
from ocnopt.control.random_paths import RandomPathError, steady
from ocnopt.control.real_tensors import RealTensors
from ocnopt.control.snapshot import Snapshot
from ocnopt.control.undisturbed import Inputs, evaluation, same_result, silent, unwatched
from ocnopt.errors import GraphError

__all__ = ["Traced", "call_key", "trace", "unwrapped"]


class Traced:
    """A model's forward as nodes in the program's order.

    Args:
        model: The model; parameters and buffers are read from it at every run.
        graph: Its graph.
        constants: What else the graph reads by name.
        anew: Those of them that every call of the model makes anew. A run has copies, and may write
            into them.
        signature: Of the model's forward.
        spec: Structure of the output where the graph returns a flat list, else None; then
            placeholders stand for the flattened arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        constants: Mapping[str, Any],
        anew: Collection[str],
        signature: inspect.Signature,
        spec: Any = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.constants = constants
        self.anew = frozenset(anew)
        self.signature = signature
        self.spec = spec
        self.modules = {
            str(node.target): model.get_submodule(str(node.target))
            for node in graph.nodes
            if node.op == "call_module"
        }

    def copied(self, model: nn.Module) -> Traced:
        """The same trace of a copy of the model."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        constants = copy.deepcopy(dict(self.constants))
        return Traced(model, graph, constants, self.anew, self.signature, self.spec)

    def made_anew(self, node: Node) -> bool:
        """Whether a node reads what every call of the model makes anew."""
        return node.op == "get_attr" and str(node.target) in self.anew

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Node, Any]:
        """Values of the placeholders for a call of the model, and what the call makes anew."""
        bound = self.signature.bind(*args, **kwargs)
        holders = [node for node in self.graph.nodes if node.op == "placeholder"]
        if self.spec is not None:
            given: Iterable[Any] = tree_flatten((bound.args, bound.kwargs))[0]
        else:
            bound.apply_defaults()
            given = bound.arguments.values()
        values = dict(zip(holders, given, strict=True))
        # Copied together, so that views of one another still are.
        anew = copy.deepcopy({name: self.constants[name] for name in self.anew})
        nodes = (node for node in self.graph.nodes if self.made_anew(node))
        return values | {node: anew[str(node.target)] for node in nodes}

    def compute(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """The result of a node that is neither placeholder nor output."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: self.value(x, values))
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def value(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """The value of a node that was computed, or what the model or the trace holds."""
        if node.op != "get_attr" or node in values:
            return values[node]
        target = str(node.target)
        if target in self.constants:
            return self.constants[target]
        return operator.attrgetter(target)(self.model)

    def output(self, values: Mapping[Node, Any]) -> Any:
        """What the model returns."""
        (node,) = (node for node in self.graph.nodes if node.op == "output")
        result = map_arg(node.args[0], lambda x: self.value(x, values))
        return result if self.spec is None else tree_unflatten(list(result), self.spec)

    def replay(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run every node in the program's order."""
        values = self.bind(args, kwargs)
        for node in self.graph.nodes:
            if node.op.startswith("call"):
                values[node] = self.compute(node, values)
        return self.output(values)


def trace(
    model: nn.Module,
    players: list[Player],
    inputs: Inputs | None,
    kind: Callable[[Traced], object],
) -> Traced:
    """Trace a model in the mode it is in, and leave it as it was.

    Where that depends on random numbers, in evaluation mode: stochastic depth has all layers there.

    Args:
        model: The model.
        players: Its players, which symbolic tracing keeps whole.
        inputs: Positional and keyword arguments of a call, or None.
        kind: What of a trace must not depend on random numbers.

    Raises:
        GraphError: The model cannot be traced.
    """
    model = unwrapped(model)
    with unwatched(model), silent():
        try:
            return _in_this_mode(model, players, inputs, kind)
        except _UntracedError as failed:
            failures = failed.reasons
            evaluate = failed.by_chance and any(m.training for m in model.modules())
        if evaluate:
            try:
                with evaluation(model):
                    return _in_this_mode(model, players, inputs, kind)
            except _UntracedError as failed:
                more = [why for why in failed.reasons if why not in failures]
                failures += [f"in evaluation, {why}" for why in more]
    raise GraphError(
        f"the graph of {type(model).__name__} could not be traced ({'; '.join(failures)}). "
        "Describe its stages by module names: Game.described(model, [['stem'], ['conv'], ...])"
    )


class _UntracedError(Exception):
    """Why no way led to a trace, and whether random numbers may be the cause."""

    def __init__(self, reasons: list[str], by_chance: bool) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons
        self.by_chance = by_chance


def _in_this_mode(
    model: nn.Module,
    players: list[Player],
    inputs: Inputs | None,
    kind: Callable[[Traced], object],
) -> Traced:
    """A trace in the mode that the model is in."""
    ways: dict[str, Callable[[], Traced]] = {"torch.fx": lambda: _symbolic(model, players, inputs)}
    if inputs is not None:
        ways["torch.export"] = lambda: _exported(model, inputs)
    # A forward that stores what it computes would store stand-ins; the tracer stores constants;
    # and what has no stand-in is written into in earnest.
    snapshot = Snapshot(model)
    reasons = []
    drawn = False
    for way, make in ways.items():
        try:
            found, seed = steady(make, kind, snapshot)
            drawn |= seed is not None
            if isinstance(found, Exception):
                raise found
            # Exported operations are those of the model with gradients enabled.
            with torch.set_grad_enabled(found.spec is not None):
                if inputs is None or same_result(model, found.replay, inputs, snapshot, seed):
                    return found
            reasons.append(f"{way}: the trace computes something else than the model")
        except RandomPathError as error:
            raise _UntracedError([*reasons, f"{way}: {error}"], by_chance=True) from None
        except Exception as error:  # tracers raise whatever the model's code raises
            text = str(error).strip() or type(error).__name__
            reasons.append(f"{way}: {text.splitlines()[0]}")
    if inputs is None:
        raise _UntracedError([*reasons, "torch.export: no example inputs were given"], False)
    # Export refuses to branch on what torch draws, and raises.
    raise _UntracedError(reasons, drawn)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that compute the same: torch.compile, data parallelism."""
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return unwrapped(compiled)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return model


def call_key(model: nn.Module, inputs: Inputs | None, shapes: bool) -> object:
    """What a trace depends on: the mode, arguments that are no tensors, and perhaps shapes."""
    model = unwrapped(model)
    modes = tuple(module.training for module in model.modules())
    arguments = _arguments(inspect.signature(model.forward), inputs)
    plain = tuple((name, repr(x) if _plain(x) else "") for name, x in arguments.items())
    if not shapes:
        return modes, plain
    leaves, spec = tree_flatten(arguments)
    kinds = ((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in leaves)
    return modes, plain, str(spec), tuple(kinds)


def _arguments(signature: inspect.Signature, inputs: Inputs | None) -> dict[str, Any]:
    """Arguments by name, defaults included; a required one that is not known is missing."""
    if inputs is None:
        return {
            name: _MISSING if p.default is inspect.Parameter.empty else p.default
            for name, p in signature.parameters.items()
        }
    bound = signature.bind(*inputs[0], **inputs[1])
    bound.apply_defaults()
    return dict(bound.arguments)


_MISSING = object()


def _plain(x: Any) -> bool:
    return x is None or isinstance(x, bool | int | float | str)


# The two ways


class _Proxy(fx.Proxy):
    """A stand-in that records ``x += y`` and ``x[i] = y`` as the writes in place that they are."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _inplace(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        function = getattr(operator, name)
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _inplace(_name))


class _Tracer(fx.Tracer):
    """Keeps players whole, Neural ODEs, and modules of torch that hold none."""

    proxy_buffer_attributes = True  # else a buffer would be written into while tracing

    def __init__(self, players: list[Player], real: RealTensors) -> None:
        super().__init__()
        self._own = {id(player.module) for player in players}
        self._real = real
        self._constants: dict[Node, Tensor] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module becomes one node."""
        if id(m) in self._own or isinstance(m, Solver):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not any(
            id(child) in self._own for child in m.modules()
        )

    def create_arg(self, a: Any) -> Any:
        """What stands for an argument in the graph; of a real tensor, where it is kept."""
        found = super().create_arg(a)
        if isinstance(a, Tensor) and isinstance(found, Node):
            self._constants[found] = a
            self._real.given_to_graph(a)
        return found

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """A node; what it overwrites is known from here on."""
        node = super().create_node(*args, **kwargs)
        if self._constants:
            for x in overwrites(node, dict(self.root.named_modules())):
                self._real.overwritten_by_graph(self._constants.get(x))
        return node

    def proxy(self, node: Node) -> fx.Proxy:
        """The stand-in for a node's result."""
        return _Proxy(node, self)


def _symbolic(model: nn.Module, players: list[Player], inputs: Inputs | None) -> Traced:
    if "forward" in vars(model):
        raise ValueError("the model's forward is replaced on the instance")
    signature = inspect.signature(model.forward)
    # Tracing must see what is no tensor, defaults included, as it is: `if mask is None`.
    fixed = {k: v for k, v in _arguments(signature, inputs).items() if _plain(v)}
    before = set(vars(model))
    with torch.no_grad(), RealTensors() as real:
        graph = _Tracer(players, real).trace(model, concrete_args=fixed or None)
    # Tensors that are none of the model's are stored in it on the way.
    constants = {name: vars(model)[name] for name in set(vars(model)) - before}
    anew = [name for name, value in constants.items() if real.made(value) and value.is_leaf]
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(holders, signature.parameters, strict=True):
        if name in fixed:
            node.meta["val"] = fixed[name]
    return Traced(model, graph, constants, anew, signature)


def _exported(model: nn.Module, inputs: Inputs) -> Traced:
    signature = inspect.signature(model.forward)
    bound = signature.bind(*inputs[0], **inputs[1])
    # With gradients enabled: evaluation without them may take kernels that fuse whole layers.
    with torch.enable_grad():
        made = torch.export.export(model, bound.args, bound.kwargs, strict=False).module()
    assert isinstance(made, fx.GraphModule)
    for node in list(made.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            made.graph.erase_node(node)
    own = {
        name
        for found in (model.named_parameters, model.named_buffers)
        for name, _ in found(remove_duplicate=False)
    }
    constants = {
        str(node.target): operator.attrgetter(str(node.target))(made)
        for node in made.graph.nodes
        if node.op == "get_attr" and node.target not in own
    }
    codegen: Any = made.graph._codegen
    # What a call makes anew is made by a node.
    return Traced(model, made.graph, constants, (), signature, codegen.pytree_info.out_spec)
