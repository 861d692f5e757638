"""Criteria, their Hessians and regularizers that the optimal-control literature trains with."""

from ocnopt.losses.hessian import hessian_factor
from ocnopt.losses.mmc import MMCLoss
from ocnopt.losses.vanishing import VanishingGradientRegularizer

__all__ = ["MMCLoss", "VanishingGradientRegularizer", "hessian_factor"]
