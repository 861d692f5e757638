"""A batch as Kronecker factors see it: one row per sample and location."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from ocnopt.control.batch import Batch
from ocnopt.control.trace import Trace
from ocnopt.control.turns import Turn

__all__ = ["InputMoments", "Views"]


class InputMoments:
    """A batch's sums of ``a a^T``; those of inputs that several players read are kept for the step.

    Args:
        batch: The samples.
        turns: All players whose factors may be asked for.
    """

    def __init__(self, batch: Batch, turns: Sequence[Turn]) -> None:
        traces = [batch.traces.get(turn.player) for turn in turns]
        readers = Counter(trace.input_key() for trace in traces if trace is not None)
        self._shared = {key for key, count in readers.items() if count > 1}
        self._kept: dict[Hashable, Tensor] = {}

    def of(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The sum for an input, computed unless it is known."""
        known = self._kept.get(key)
        if known is None:
            known = compute()
            if key in self._shared:
                self._kept[key] = known
        return known


class Views:
    """Inputs and signals of some players in one batch, laid out when they are asked for, once.

    Players often read the same tensor: query, key and value, the first layers of branches. Its
    rows are laid out once, and their moments are computed once.

    Args:
        batch: The samples.
        turns: The players.
        coefficients: Per player: those of the recorded columns that make its signal.
        inputs: The moments of inputs that are known already.
        rows: Inputs that are laid out already; those of the players are added.
    """

    def __init__(
        self,
        batch: Batch,
        turns: Sequence[Turn],
        coefficients: Sequence[Tensor],
        inputs: InputMoments,
        rows: dict[Hashable, Tensor],
    ) -> None:
        self._traces: dict[int, Trace] = {}
        self._keys: dict[int, Hashable] = {}
        self._rows = rows
        self._cols: dict[int, Tensor] = {}
        self._known = inputs
        self._crosses: dict[tuple[Hashable, Hashable], Tensor] = {}
        for turn, values in zip(turns, coefficients, strict=True):
            trace = batch.traces.get(turn.player)
            if trace is not None:
                self._traces[id(turn)] = trace
                self._keys[id(turn)] = trace.input_key()
                self._cols[id(turn)] = trace.cols(values).to(trace.dtype)

    def moments(self, one: Turn, other: Turn) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sums of ``a_n a_m^T`` and of ``V_h,n V_h,m^T``, and how many rows were summed.

        Returns:
            (groups, in, in), (groups, out, out) and (1,); None where one of the players took no
            part.
        """
        if id(one) not in self._keys or id(other) not in self._keys:
            return None
        mine, theirs = self._cols[id(one)], self._cols[id(other)]
        cols = one.player.layer.cross_moment(mine, theirs)
        return self._inputs(one, other), cols, mine.new_tensor([mine.shape[0] * mine.shape[1]])

    def _inputs(self, one: Turn, other: Turn) -> Tensor:
        keys = self._keys[id(one)], self._keys[id(other)]

        def compute() -> Tensor:
            found: Tensor = one.player.layer.cross_moment(
                self._laid_out(one), self._laid_out(other)
            )
            return found

        if keys[0] == keys[1]:
            return self._known.of(keys[0], compute)
        if keys not in self._crosses:
            self._crosses[keys] = compute()
        return self._crosses[keys]

    def _laid_out(self, turn: Turn) -> Tensor:
        key, trace = self._keys[id(turn)], self._traces[id(turn)]
        if key not in self._rows:
            self._rows[key] = trace.rows().to(trace.dtype)
        return self._rows[key]
