"""Steps of a training run, one at a time: to see that it runs at all, and to time it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ocnopt.errors import NonFiniteError
from ocnopt.experiments import optimizers
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.order import DataOrder
from ocnopt.experiments.own import told
from ocnopt.experiments.setup import build_network
from ocnopt.experiments.training import threads

__all__ = ["ROUNDS", "StepTime", "time_steps", "try_step"]

#: Rounds of the timing, where a round does not take long.
ROUNDS = 9
_FEW_ROUNDS = 3
#: Steps of a block: whole tens, as Kronecker factors are renewed every tenth step.
_TEN, _MOST_TENS = 10, 5
#: Seconds that the slowest block should take; rounds longer than the second are made few.
_BLOCK_SECONDS, _LONG = 0.25, 1.0
#: How often a run that comes to no number is started again before its time is given up.
_ATTEMPTS = 3


@dataclass(frozen=True)
class StepTime:
    """Wall-clock time of a step.

    Attributes:
        milliseconds: Median over the rounds.
        ratio: Median over the rounds of this time to that of the first in the same round; None
            where the first has no time.
        blocks: Milliseconds per step, round by round.
    """

    milliseconds: float
    ratio: float | None
    blocks: tuple[float, ...]


def try_step(config: TrainConfig, data: Data, label: str) -> None:
    """Take one step, so that what cannot run is found before hours of runs.

    Args:
        config: Resolved.
        data: Its data.
        label: What it is called in the message.

    Raises:
        InputError: It cannot run. A step that comes to no number is a result, not an error.
    """
    with _alone():
        try:
            _Stepper(config, data).step()
        except NonFiniteError:
            return
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
        except Exception as error:
            # The module may be the user's own: the place is what they need to find the mistake.
            raise InputError(f"{label}: the first step failed with {told(error)}") from error


def time_steps(
    configs: Mapping[str, TrainConfig], data: Data, advance: Callable[[], None]
) -> dict[str, StepTime | None]:
    """Time the steps of several runs, which take turns on one thread.

    In every round each of them takes a block of steps: what else the machine does hits all of them
    alike, and medians forget what hits one.

    Args:
        configs: Runs by name, resolved; they share the data.
        data: The data.
        advance: Called `ROUNDS` times in all, evenly.

    Returns:
        By name; None for a run that keeps coming to no number.
    """
    with _alone():
        steppers = {name: _Stepper(config, data) for name, config in configs.items()}
        slowest = max((s.warm_up(_TEN) for s in steppers.values()), default=0.0)
        tens = min(max(int(_BLOCK_SECONDS / max(slowest, 1e-9) / _TEN), 1), _MOST_TENS)
        periods = [int(c.options.get("update_every") or 1) for c in configs.values()]
        steps = max(_TEN * tens, *periods) if periods else _TEN
        rounds = _FEW_ROUNDS if slowest * steps > _LONG else ROUNDS
        blocks: dict[str, list[float | None]] = {name: [] for name in steppers}
        for number in range(rounds):
            for name, stepper in steppers.items():
                blocks[name].append(stepper.timed(steps))
            for _ in range(number * ROUNDS // rounds, (number + 1) * ROUNDS // rounds):
                advance()
    first = next(iter(blocks.values()), [])
    return {name: _summed_up(times, first) for name, times in blocks.items()}


def _summed_up(times: Sequence[float | None], first: Sequence[float | None]) -> StepTime | None:
    done = [1e3 * t for t in times if t is not None]
    ratios = [t / f for t, f in zip(times, first, strict=True) if t is not None and f is not None]
    if not done:
        return None
    ratio = statistics.median(ratios) if ratios else None
    return StepTime(statistics.median(done), ratio, tuple(done))


class _Stepper:
    """A run that is taken step by step.

    Args:
        config: Resolved.
        data: Its data.
    """

    def __init__(self, config: TrainConfig, data: Data) -> None:
        assert config.batch_size is not None and config.lr is not None  # resolved
        self.config = config
        self.device = torch.device(config.device)
        self.data = data.to(self.device)
        samples = len(data.train_y)
        self.order = DataOrder(samples, config.batch_size, config.seed, self.device)
        self.criterion = nn.CrossEntropyLoss()
        self.restart()

    def restart(self) -> None:
        """Go back to the initial weights."""
        config = self.config
        assert config.lr is not None
        torch.manual_seed(config.seed)
        self.model = build_network(config, self.data).to(self.device)
        self.optimizer = optimizers.build(
            config.optimizer, self.model, self.criterion, config.lr, config.options
        )
        self.batchwise = optimizers.runs_batches(self.optimizer)
        self.model.train()
        self.done = 0

    def step(self) -> None:
        """Take one step, as `training.train` does."""
        index = self.order.batch(self.done)
        x, y = self.data.train_x[index], self.data.train_y[index]
        self.done += 1
        if self.batchwise:
            loss = self.optimizer.step(x, y)  # type: ignore[call-overload]
            assert isinstance(loss, Tensor)
            return
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def warm_up(self, steps: int) -> float:
        """Take steps; return the seconds of one, half of them aside, which may be the slowest."""
        half = steps // 2
        self.timed(half)
        return self.timed(steps - half) or 0.0

    def timed(self, steps: int) -> float | None:
        """Take steps; return the seconds of one, or None where they come to no number."""
        for _ in range(_ATTEMPTS):
            try:
                self._wait()
                started = time.perf_counter()
                for _ in range(steps):
                    self.step()
                self._wait()
            except NonFiniteError:
                self.restart()
                continue
            return (time.perf_counter() - started) / steps
        return None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _alone() -> Iterator[None]:
    """One thread, and the caller's random state left as it was."""
    with threads(1), torch.random.fork_rng(devices=[]):
        yield
