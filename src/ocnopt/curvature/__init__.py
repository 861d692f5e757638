"""Preconditioners ``M_t`` of Table 2, one class each, carrying their own options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ocnopt.curvature.base import Observation, Preconditioner
from ocnopt.curvature.elementwise import Adam, Identity, RMSprop
from ocnopt.curvature.kronecker import EKFAC, KFAC
from ocnopt.errors import OptionError

__all__ = [
    "EKFAC",
    "KFAC",
    "PRECONDITIONERS",
    "Adam",
    "Identity",
    "Observation",
    "Preconditioner",
    "RMSprop",
    "preconditioner",
]

PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    kind.name: kind for kind in (Identity, RMSprop, Adam, KFAC, EKFAC)
}


def preconditioner(spec: str | Preconditioner | dict[str, Any]) -> Preconditioner:
    """A preconditioner from its name, its saved options, or itself.

    Args:
        spec: A name of :data:`PRECONDITIONERS`, a mapping with ``name`` and options, or an object.

    Raises:
        OptionError: Unknown name or option.
    """
    if isinstance(spec, Preconditioner):
        # A user's own kind is known by name from here on, as checkpoints refer to it.
        PRECONDITIONERS.setdefault(spec.name, type(spec))
        return spec
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in PRECONDITIONERS:
        known = ", ".join(repr(n) for n in PRECONDITIONERS)
        raise OptionError(
            f"preconditioner={spec!r} is not known; choose one of {known} or an object of "
            "ocnopt.curvature, such as KFAC(damping=0.1)"
        )
    try:
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        return PRECONDITIONERS[name](**options)
    except TypeError as error:
        raise OptionError(f"preconditioner {name!r}: {error}") from error
