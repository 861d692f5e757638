"""Train continuous normalizing flows on densities in the plane and on tables.

Example::

    run = RECIPES["miniboone-snopt"]
    found = train_flow(run, load(run.density, data_root))
"""

from ocnopt.experiments.flows.network import GAS, MINIBOONE, PLANE, FlowNetwork, build
from ocnopt.experiments.flows.run import RECIPES, FlowRun
from ocnopt.experiments.flows.training import load, train_flow

__all__ = [
    "GAS",
    "MINIBOONE",
    "PLANE",
    "RECIPES",
    "FlowNetwork",
    "FlowRun",
    "build",
    "load",
    "train_flow",
]
