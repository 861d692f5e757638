"""What the operations of a traced graph need of one another, writes in place included.

An operation needs the results that it reads, as they were when it read them. Where nothing is
overwritten, its arguments say it all. Where something is, two operations may be bound to an order
though neither reads the other's result: whoever reads a tensor before it is overwritten must come
before, whoever reads it (or a view of it) after, after.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

__all__ = ["INPLACE_OPERATORS", "Needs", "find_needs", "is_state", "name_of", "overwrites"]

#: ``x += y`` and so on, by the names of Python's operator module.
INPLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")

# Packages of torch modules whose result is a new tensor, unless they say inplace=True.
_NEW = tuple(
    f"torch.nn.modules.{name}"
    for name in ("activation", "pooling", "batchnorm", "normalization", "instancenorm", "padding")
)
# What a tensor is asked for that is no tensor.
_FACTS = frozenset(
    {"size", "dim", "ndim", "shape", "numel", "dtype", "device", "is_floating_point", "stride"}
    | {"requires_grad", "is_cuda", "ndimension", "nelement", "storage_offset", "sym_size"}
)


# Operations made of others in torch, whose schemas do not say whether they return an argument (as
# ``type_as`` does), and of which it is known that they do not.
_COMPUTED = frozenset(
    {"linear", "bilinear", "matmul", "linalg_matmul", "inner", "outer", "square", "embedding_bag"}
    | {f"conv{n}d" for n in (1, 2, 3)}
    | {f"conv_transpose{n}d" for n in (1, 2, 3)}
    | {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)}
    | {f"{kind}_norm" for kind in ("batch", "layer", "group", "instance", "rms")}
    | {"softmax", "log_softmax", "relu6", "selu", "prelu", "log_sigmoid", "pad", "where"}
    | {"concat", "concatenate", "hstack", "vstack", "multiply", "divide", "true_divide"}
    | {"subtract", "negative", "clip", "max", "min", "std", "var"}
    | {"scaled_dot_product_attention", "cross_entropy_loss", "nll_loss_nd"}
)


@dataclass(frozen=True)
class Needs:
    """What one operation needs of earlier ones.

    Attributes:
        flow: Operations whose result reaches it, directly or through memory.
        order: Further operations that must not come after it: they read what it overwrites.
    """

    flow: frozenset[Node]
    order: frozenset[Node]


def find_needs(
    graph: Graph, modules: Mapping[str, nn.Module], home: Callable[[Node], object]
) -> dict[Node, Needs]:
    """Find what every node of a graph needs.

    Args:
        graph: Traced; its order is that of the program.
        modules: What its ``call_module`` nodes call, by target.
        home: Returns where the memory of a ``get_attr`` node is: the same for views of a tensor.

    Returns:
        By node, in the program's order.
    """
    needs: dict[Node, Needs] = {}
    # The memory that a node's result may lie in, by the nodes that made it.
    memory: dict[Node, frozenset[Any]] = {}
    written: dict[Any, Node] = {}
    readers: dict[Any, set[Node]] = {}
    called: dict[int, Node] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        overwritten = {place for x in overwrites(node, modules) for place in memory[x]}
        touched = {place for x in inputs for place in memory[x]}
        flow = {*inputs, *(written[place] for place in touched if place in written)}
        order: set[Node] = set()
        for place in overwritten:
            order |= readers.pop(place, set())
            written[place] = node
        for place in touched - overwritten:
            readers.setdefault(place, set()).add(node)
        if node.op == "call_module":
            module = modules[str(node.target)]
            earlier = called.get(id(module))
            called[id(module)] = node
            # The weights of a module act where it is first used; statistics, if it keeps any,
            # are gathered call by call.
            if earlier is not None and any(True for _ in (*module.parameters(), *module.buffers())):
                flow.add(earlier)
        needs[node] = Needs(frozenset(flow), frozenset(order - flow - {node}))
        if node.op == "get_attr":
            memory[node] = frozenset({home(node)})
        elif _may_alias(node, modules):
            memory[node] = frozenset(place for x in inputs for place in memory[x])
        else:
            memory[node] = frozenset({node})
    return needs


def name_of(node: Node) -> str:
    """The plain name of the function or method that a node calls."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", ""))


def is_state(node: Node, known: Mapping[Node, bool]) -> bool:
    """Whether a node's result is a tensor, or a collection of them, and not a size or a flag."""
    if "val" in node.meta:
        value = node.meta["val"]
        return isinstance(value, torch.Tensor | list | tuple | dict)
    if name_of(node) in _FACTS or (node.target is getattr and node.args[1] in _FACTS):
        return False
    if node.op in ("call_function", "call_method") and node.all_input_nodes:
        return any(known[x] for x in node.all_input_nodes)
    return True


def overwrites(node: Node, modules: Mapping[str, nn.Module]) -> list[Node]:
    """The arguments that a node writes into.

    Args:
        node: Of a traced graph.
        modules: What ``call_module`` nodes call, by target.
    """
    if node.op == "call_module":
        inplace = any(getattr(m, "inplace", False) for m in modules[str(node.target)].modules())
        return node.all_input_nodes if inplace else []
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = {a.name: value for a, value in zip(arguments, node.args, strict=False)}
        given.update(node.kwargs)
        found = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
        return _nodes(found)
    found = [node.kwargs.get("out")]
    name = name_of(node)
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if in_place or node.target in _WRITING or _asks_inplace(node):
        found += [*node.args, *node.kwargs.values()][:1]
    return _nodes(found)


def _nodes(arguments: object) -> list[Node]:
    """The nodes among arguments, those in lists of tensors included."""
    return [x for x in tree_leaves(arguments) if isinstance(x, Node)]


_WRITING = {operator.setitem, *(getattr(operator, name) for name in INPLACE_OPERATORS)}


def _asks_inplace(node: Node) -> bool:
    """Whether a function such as ``F.relu`` is called with ``inplace=True``, by name or not."""
    if node.op != "call_function" or not node.args:
        return bool(node.kwargs.get("inplace"))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace"))
    return bool(bound.arguments.get("inplace"))


def _may_alias(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node's result may share memory with an argument; yes where it is not known."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if overwrites(node, modules):
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        own = any(True for _ in module.parameters(recurse=False))  # Linear, Conv, norms
        return not (own or type(module).__module__ in _NEW)
    name = name_of(node)
    if "dropout" in name:
        return True  # the input itself in evaluation
    if name.startswith(("unsafe_", "resize")):
        return True  # views, whatever their schemas say
    if getattr(node.target, "__module__", "") == "_operator":
        return name in ("getitem", "pos")
    if isinstance(node.target, torch._ops.OpOverload):
        schemas = [node.target._schema]
    elif not str(getattr(node.target, "__module__", None) or "torch").startswith("torch"):
        return True  # whatever it shares its name with
    else:
        schemas = [
            schema
            for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
            if "out" not in schema.overload_name
        ]
    return not schemas or any(_may_return_argument(schema) for schema in schemas)


def _may_return_argument(schema: torch._C.FunctionSchema) -> bool:
    """Whether a result may share memory with an argument; yes where torch does not say."""
    if any(result.alias_info is not None for result in schema.returns):
        return True
    namespace, _, name = schema.name.rpartition("::")
    if namespace == "aten" and name in _COMPUTED:
        return False
    full = f"{schema.name}.{schema.overload_name}".rstrip(".")
    made_of_others: bool = torch._C._dispatch_has_kernel(
        full
    ) and torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd")
    return made_of_others
