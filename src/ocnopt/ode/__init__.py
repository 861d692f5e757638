"""Neural ODEs: the block, its adjoints and its integration time."""

from ocnopt.ode.fields import ConcatConv2d, ConcatLinear, ConcatSquashLinear, TimedSequential
from ocnopt.ode.integration_time import Change, IntegrationTime
from ocnopt.ode.neural_ode import Evaluations, NeuralODE

__all__ = [
    "Change",
    "ConcatConv2d",
    "ConcatLinear",
    "ConcatSquashLinear",
    "Evaluations",
    "IntegrationTime",
    "NeuralODE",
    "TimedSequential",
]
