"""Neural ODEs: the block, its adjoints, its integration time, and densities made of it."""

from ocnopt.ode.dense_adjoint import SecondOrder, second_order
from ocnopt.ode.divergence import exact_divergence, hutchinson_divergence
from ocnopt.ode.fields import ConcatConv2d, ConcatLinear, ConcatSquashLinear, TimedSequential
from ocnopt.ode.flow import ContinuousFlow
from ocnopt.ode.integration_time import Change, IntegrationTime
from ocnopt.ode.low_rank_adjoint import (
    AdjointError,
    LowRank,
    adjoint_errors,
    gradient_column,
    hessian_columns,
    second_order_low_rank,
)
from ocnopt.ode.neural_ode import Evaluations, NeuralODE

__all__ = [
    "AdjointError",
    "Change",
    "ConcatConv2d",
    "ConcatLinear",
    "ConcatSquashLinear",
    "ContinuousFlow",
    "Evaluations",
    "IntegrationTime",
    "LowRank",
    "NeuralODE",
    "SecondOrder",
    "TimedSequential",
    "adjoint_errors",
    "exact_divergence",
    "gradient_column",
    "hessian_columns",
    "hutchinson_divergence",
    "second_order",
    "second_order_low_rank",
]
