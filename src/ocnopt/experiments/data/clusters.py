"""Gaussian clusters, as in Fig. 8 of Liu et al., ICLR 2021."""

from __future__ import annotations

import torch
from torch import Tensor

DIMENSION = 30
SAMPLES = 1500
SPREAD = 2.0  # of the centers, where nothing else is asked for; the clusters' own is 1


def gaussian_clusters(k: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Samples around k centers, with variance 1.

    Args:
        k: Number of clusters, equally large.
        spread: Standard deviation of a center's coordinates.
        seed: Seed of centers and samples.

    Returns:
        Inputs (SAMPLES, DIMENSION) and clusters (SAMPLES,), int64. Consecutive samples belong to
        the clusters in turn, so that any stretch of them is balanced.
    """
    generator = torch.Generator().manual_seed(seed)
    centers = spread * torch.randn(k, DIMENSION, generator=generator)
    y = torch.arange(SAMPLES) % k
    return centers[y] + torch.randn(SAMPLES, DIMENSION, generator=generator), y
