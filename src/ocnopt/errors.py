"""Every error that the package raises on purpose.

Each message says what is wrong, where (layer or option name) and what to try.
"""

from __future__ import annotations

__all__ = [
    "GraphError",
    "NonFiniteError",
    "OcnoptError",
    "OptionError",
    "RecordingError",
    "SolverError",
]


class OcnoptError(Exception):
    """Base class of all errors raised by the package."""


class OptionError(OcnoptError, ValueError):
    """An option, or a combination of options, that the constructor cannot accept."""


class RecordingError(OcnoptError, RuntimeError):
    """What happened between ``forward`` and ``step`` could not be recorded faithfully."""


class GraphError(OcnoptError, RuntimeError):
    """The network's graph does not admit the requested computation."""


class NonFiniteError(OcnoptError, ArithmeticError):
    """A loss, a gradient or an update is not finite; no weight was changed."""


class SolverError(NonFiniteError):
    """A differential equation could not be solved: steps underflow, run out, or overflow."""
