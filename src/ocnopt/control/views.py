"""A batch as Kronecker factors see it: one row per sample and location."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.turns import Turn

__all__ = ["Views"]


class Views:
    """Inputs and signals of some players in one batch, laid out once.

    Players often read the same tensor: query, key and value, the first layers of branches. Its
    rows are laid out once, and their moments are computed once.

    Args:
        batch: The samples.
        turns: The players.
        coefficients: Per player: those of the recorded columns that make its signal.
    """

    def __init__(self, batch: Batch, turns: Sequence[Turn], coefficients: Sequence[Tensor]) -> None:
        self._rows: dict[Hashable, Tensor] = {}
        self._keys: dict[int, Hashable] = {}
        self._cols: dict[int, Tensor] = {}
        self._inputs: dict[tuple[Hashable, Hashable], Tensor] = {}
        for turn, values in zip(turns, coefficients, strict=True):
            trace = batch.traces.get(turn.player)
            if trace is None:
                continue
            key = self._keys[id(turn)] = trace.input_key()
            if key not in self._rows:
                self._rows[key] = trace.rows().to(trace.dtype)
            self._cols[id(turn)] = trace.cols(values).to(trace.dtype)

    def moments(self, one: Turn, other: Turn) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sums of ``a_n a_m^T`` and of ``V_h,n V_h,m^T``, and how many rows were summed.

        Returns:
            (groups, in, in), (groups, out, out) and (1,); None where one of the players took no
            part.
        """
        if id(one) not in self._keys or id(other) not in self._keys:
            return None
        layer = one.player.layer
        keys = self._keys[id(one)], self._keys[id(other)]
        rows, other_rows = self._rows[keys[0]], self._rows[keys[1]]
        if keys not in self._inputs:
            self._inputs[keys] = layer.cross_moment(rows, other_rows)
        cols = layer.cross_moment(self._cols[id(one)], self._cols[id(other)])
        return self._inputs[keys], cols, rows.new_tensor([rows.shape[0] * rows.shape[1]])
