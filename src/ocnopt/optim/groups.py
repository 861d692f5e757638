"""Parameter groups of a model-first optimizer: by name, prefix, module or tensor."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ocnopt.errors import OptionError

__all__ = ["resolve", "resolve_groups"]


def resolve(model: nn.Module, spec: Any) -> list[Tensor]:
    """The parameters that an entry of a group names.

    Args:
        model: The model.
        spec: A parameter's name, a module's name (prefix), a module, a tensor, or several of
            these.

    Raises:
        OptionError: A name that is not in the model.
    """
    if isinstance(spec, Tensor):
        return [spec]
    if isinstance(spec, nn.Module):
        return list(spec.parameters())
    if isinstance(spec, str):
        named = dict(model.named_parameters(remove_duplicate=False))
        if spec in named:
            return [named[spec]]
        found: list[Tensor] = [p for name, p in named.items() if name.startswith(f"{spec}.")]
        if not found:
            modules = [name for name, _ in model.named_modules() if name]
            near = difflib.get_close_matches(spec, [*named, *modules], n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise OptionError(
                f"params: no parameter or module of the model is named {spec!r}{hint}"
            )
        return found
    if isinstance(spec, Iterable):
        return [p for entry in spec for p in resolve(model, entry)]
    raise OptionError(
        f"params: cannot read {spec!r} ({type(spec).__name__}); give names, modules or parameters"
    )


def resolve_groups(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """All groups, the last one holding whatever the others do not name.

    Args:
        model: The model.
        params: None, or a list whose entries are groups (mappings with ``params``) or what
            :func:`resolve` takes; the latter go into the last group, too.

    Returns:
        Groups as ``torch.optim.Optimizer`` takes them. Frozen parameters are in them, too: they
        are trained once they are unfrozen.

    Raises:
        OptionError: Unknown names, a parameter in two groups, or nothing to train.
    """
    groups: list[dict[str, Any]] = []
    taken: dict[int, int] = {}
    if isinstance(params, (str, dict, Tensor)) or not isinstance(params, Iterable):
        params = () if params is None else (params,)
    for entry in params:
        if not isinstance(entry, dict):
            raise OptionError(
                "params: expected groups such as {'params': 'encoder', 'lr': 0.01}, got "
                f"{type(entry).__name__}; parameters that no group names are trained with the "
                "constructor's options"
            )
        if "params" not in entry:
            raise OptionError("params: a group needs the key 'params'")
        unique = {id(p): p for p in resolve(model, entry["params"])}
        for key in unique:
            if key in taken:
                name = next((n for n, p in model.named_parameters() if id(p) == key), "a tensor")
                raise OptionError(f"params: {name!r} is in groups {taken[key]} and {len(groups)}")
            taken[key] = len(groups)
        groups.append({**entry, "params": list(unique.values())})
    rest = [p for p in model.parameters() if id(p) not in taken]
    if rest:
        groups.append({"params": rest})
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError("the model has no parameter that requires a gradient")
    return groups
