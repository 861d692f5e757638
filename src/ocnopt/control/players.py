"""Which parts of a model are players, and why the rest are not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy

from ocnopt.errors import OptionError
from ocnopt.layers import Layer, kind_of

__all__ = ["Player", "Solver", "Unowned", "find_players", "find_solved"]


class Solver(nn.Module):
    """A module that calls another as often as it likes, in the backward pass too.

    Attributes:
        func: The other; no layer in it can be told what a call of it belongs to.
    """

    func: nn.Module


@dataclass(eq=False)
class Player:
    """One module with the parameters that its player owns.

    Attributes:
        name: The module's name in the model; "" for the model itself.
        module: The module.
        layer: What the core knows of its kind.
        params: The owned parameters, aligned with ``layer.names``.
        index: Position in the list of players.
    """

    name: str
    module: nn.Module
    layer: Layer
    params: tuple[Parameter, ...]
    index: int


@dataclass(frozen=True)
class Unowned:
    """A trained parameter without a player, and why."""

    name: str
    module: str
    param: Tensor
    kind: str
    reason: str


def _time_first(module: nn.Module) -> bool:
    """Whether dimension 0 of a torch module's tensors is time by its own declaration."""
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return any(_time_first(layer) for layer in module.layers)
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return not module.batch_first
    return False


def _solved(model: nn.Module) -> dict[int, str]:
    """The modules that solvers call, each with its solver's name."""
    return {
        id(part): name
        for name, module in model.named_modules()
        if isinstance(module, Solver)
        for part in module.func.modules()
    }


def find_solved(model: nn.Module) -> list[Player]:
    """The layers of a model's Neural ODEs: players of the adjoint, not of the model's pass.

    Args:
        model: Any module.

    Returns:
        They, indexed from 0 in the order of ``model.named_modules()``.
    """
    return _split(model, inside=True)[0]


def find_players(model: nn.Module) -> tuple[list[Player], list[Unowned]]:
    """Split a model's trained parameters into players and the rest.

    Layers of a Neural ODE are among the rest: a solver calls them, forward and backward, as often
    as it likes. See :func:`find_solved`.

    Args:
        model: Any module.

    Returns:
        The players in the order of ``model.named_modules()``, and the parameters no player owns.

    Raises:
        OptionError: A parameter is not initialized yet (lazy modules).
    """
    return _split(model, inside=False)


def _split(model: nn.Module, inside: bool) -> tuple[list[Player], list[Unowned]]:
    """The players inside Neural ODEs or outside of them, and the parameters of no player."""
    solved = _solved(model)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append(f"{name}.{key}" if name else key)
    attention = {
        id(child): name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    time_first = {
        id(child): name
        for name, module in model.named_modules()
        if _time_first(module)
        for child in module.modules()
    }
    players: list[Player] = []
    unowned: list[Unowned] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own: dict[str, Parameter] = {}
        for key, param in module._parameters.items():
            if param is None or id(param) in seen or not param.requires_grad:
                continue
            if is_lazy(param):
                raise OptionError(
                    f"parameter {key!r} of layer {name!r} is not initialized; run one forward "
                    "pass through the model before building the optimizer"
                )
            own[key] = param
            seen.add(id(param))
        if not own:
            continue
        kind = kind_of(module)
        reason: str | None = None
        if isinstance(kind, str):
            reason = kind
        elif id(module) in attention:
            reason = f"nn.MultiheadAttention {attention[id(module)]!r} uses it without calling it"
        elif id(module) in time_first:
            reason = f"{time_first[id(module)]!r} has batch_first=False: dimension 0 is time"
        else:
            reason = kind.refuse(module)
        prefix = f"{name}." if name else ""
        for key in list(own):
            others = [o for o in owners[id(own[key])] if o != prefix + key]
            why = reason
            if why is None and others:
                why = f"shared with {', '.join(others)}"
            if why is None and own[key].is_complex():
                why = "its numbers are complex"
            if why is None and key not in ("weight", "bias"):
                why = f"not a weight or bias of {type(module).__name__}"
            if why is None and (id(module) in solved) != inside:
                why = f"NeuralODE {solved.get(id(module))!r} solves it; see SNOpt"
            if why is not None:
                param = own.pop(key)
                unowned.append(Unowned(prefix + key, name, param, type(module).__name__, why))
        if own and not isinstance(kind, str):
            names = tuple(key for key in ("weight", "bias") if key in own)
            layer = kind(module, names)
            params = tuple(own[key] for key in names)
            players.append(Player(name, module, layer, params, len(players)))
    return players, unowned
