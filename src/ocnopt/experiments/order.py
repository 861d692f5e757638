"""The order in which a run sees its data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class DataOrder:
    """Mini-batches in a new random order every epoch, from the seed and the step alone.

    The permutation of an epoch depends on nothing but the seed and the epoch's number. A run can
    therefore be taken up at any step without the order having been stored, and optimizers that
    are compared under one seed see the same batches.

    Attributes:
        steps_per_epoch: Complete batches per epoch; what is left over is dropped.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, device: torch.device) -> None:
        """Set up the order.

        Args:
            samples: Number of training samples, at least `batch_size`.
            batch_size: Samples per batch.
            seed: Seed of all permutations.
            device: Device of the indices.
        """
        self.steps_per_epoch = samples // batch_size
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """Return the indices, (batch_size,), of a step's samples; steps count from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = self._permute(epoch)
            self._epoch = epoch
        start = position * self._batch_size
        return self._permutation[start : start + self._batch_size]

    def _permute(self, epoch: int) -> Tensor:
        # SeedSequence mixes the two numbers, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        mixed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        return torch.randperm(self._samples, generator=generator).to(self._device)
