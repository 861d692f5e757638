"""Training stays stable where the learning rate is wrong, and is no worse where it is right.

A short form of benchmarks/robustness.py: DIGITS, five tanh layers, batch 8.
"""

from statistics import fmean

import pytest

pytest.importorskip("sklearn")

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.training import train


def loss(optimizer, lr):
    """Mean over two seeds of the training loss over the last of five epochs."""
    return fmean(
        train(TrainConfig(optimizer=optimizer, lr=lr, seed=seed, steps=890, threads=1)).train_loss
        for seed in (0, 1)
    )


def test_large_learning_rate():
    assert loss("ddpnopt", 0.6) < 0.5 * loss("sgd", 0.6)


def test_good_learning_rate():
    assert loss("ddpnopt", 0.1) < 1.1 * loss("sgd", 0.1)
