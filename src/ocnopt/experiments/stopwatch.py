"""How long a piece of work takes, by the wall clock and by the processor's."""

from __future__ import annotations

import time

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the time between every start and the stop that follows.

    CPU seconds are those of the thread that starts and stops, so that neither other work on the
    machine nor a progress bar counts; where torch spreads its sums over several threads, they are
    those of the whole process. Work of a GPU is in the wall-clock seconds alone.

    Args:
        seconds: Wall-clock seconds to go on from.
        cpu_seconds: CPU seconds to go on from.
    """

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.cpu_seconds = cpu_seconds
        self._cpu = time.thread_time if torch.get_num_threads() == 1 else time.process_time
        self._started = (0.0, 0.0)

    def start(self) -> None:
        """Begin to count."""
        self._started = time.perf_counter(), self._cpu()

    def stop(self) -> None:
        """Add what has gone by since the start."""
        cpu = self._cpu()
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += cpu - self._started[1]
