"""One step of the package in the ordinary loop, and its comparison with an oracle's step."""

from __future__ import annotations

import copy

import torch
from cases import Case
from oracles import Options
from torch import Tensor, nn

import ocnopt

TOLERANCE = 1e-9


def preconditioner_of(options: Options):
    """The preconditioner as a user would hand it over: an object with the oracle's options.

    The oracle's Kronecker factors are those of the current batch, so nothing is smoothed or kept.
    """
    every_step = {"decay": 0.0, "update_every": 1}
    if options.preconditioner == "rmsprop":
        return ocnopt.curvature.RMSprop(decay=options.decay, eps=options.eps)
    if options.preconditioner == "adam":
        return ocnopt.curvature.Adam(betas=options.betas, eps=options.eps)
    if options.preconditioner == "kfac":
        return ocnopt.curvature.KFAC(damping=options.damping, **every_step)
    if options.preconditioner == "ekfac":
        return ocnopt.curvature.EKFAC(
            damping=options.damping, eigen_decay=options.eigen_decay, gram_tolerance=0, **every_step
        )
    return options.preconditioner


def optimizer_for(
    model: nn.Module, criterion: nn.Module, options: Options, **others
) -> ocnopt.DDPNOpt:
    """The package's optimizer with the oracle's options."""
    arguments = {
        "lr": options.lr,
        "preconditioner": preconditioner_of(options),
        "bellman": options.bellman,
        "rollout": options.rollout,
        "terminal": options.terminal,
        "feedback_clip": options.feedback_clip,
        "curvature": options.curvature,
        "momentum": options.momentum,
        "weight_decay": options.weight_decay,
    }
    return ocnopt.DDPNOpt(model, criterion, **{**arguments, **others})


def train_step(optimizer, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The ordinary loop's body; the loss before the step."""
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def package_step(case: Case, options: Options, parts=None, **others) -> dict[str, Tensor]:
    """The parameters, by name, after one step of the package on a copy of the case's model.

    `parts` are sizes of the pieces over which the batch is accumulated; None for one piece.
    """
    model, criterion = copy.deepcopy(case.model), copy.deepcopy(case.criterion)
    optimizer = optimizer_for(model, criterion, options, **others)
    optimizer.zero_grad()
    batch = len(case.x)
    for x, y in zip(case.x.split(parts or batch), case.y.split(parts or batch), strict=True):
        (criterion(model(x), y) * (len(x) / batch)).backward()
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_step(
    case: Case,
    actual: dict[str, Tensor],
    expected: dict[nn.Parameter, Tensor],
    tolerance: float = TOLERANCE,
) -> None:
    """Every parameter's *change* agrees, relative to the largest entry of that change."""
    for name, p in case.model.named_parameters():
        if p not in expected:
            assert torch.equal(actual[name], p.detach()), f"{name} is no control"
            continue
        want = expected[p] - p.detach()
        error = float((actual[name] - p.detach() - want).abs().max())
        # rounding of u + du itself is relative to u, not to du
        floor = 1e-14 * float(p.detach().abs().max())
        assert error <= tolerance * float(want.abs().max()) + floor, (
            f"{name}: off by {error:.2e}, the change is {float(want.abs().max()):.2e}"
        )
    assert torch.cat([(expected[p] - p).reshape(-1) for p in expected]).abs().max() > 1e-6
