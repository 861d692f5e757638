"""The optimizers."""

from ocnopt.optim.base import Coverage, ModelOptimizer
from ocnopt.optim.ddpnopt import DDPNOpt
from ocnopt.optim.kfac import EKFAC, KFAC

__all__ = ["EKFAC", "KFAC", "Coverage", "DDPNOpt", "ModelOptimizer"]
