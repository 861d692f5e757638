"""The optimizers."""

from ocnopt.optim.base import Coverage, ModelOptimizer
from ocnopt.optim.ddpnopt import DDPNOpt
from ocnopt.optim.dgnopt import DGNOpt
from ocnopt.optim.emsa import EMSA
from ocnopt.optim.kfac import EKFAC, KFAC
from ocnopt.optim.ocnopt import OCNOpt
from ocnopt.optim.snopt import SNOpt
from ocnopt.optim.vanilla_ddp import VanillaDDP

__all__ = [
    "EKFAC",
    "EMSA",
    "KFAC",
    "Coverage",
    "DDPNOpt",
    "DGNOpt",
    "ModelOptimizer",
    "OCNOpt",
    "SNOpt",
    "VanillaDDP",
]
