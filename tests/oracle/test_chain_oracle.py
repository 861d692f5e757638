"""DDPNOpt on chains == Alg. 3 of DDPNOpt (ICLR 2021) with dense matrices, option by option."""

from __future__ import annotations

import dataclasses
import functools

import cases
import comparison
import pytest
import torch
from oracles import Options, ddp_step, distance, row_losses

import ocnopt

fc_case = functools.cache(cases.fc_chain)
conv_case = functools.cache(cases.conv_chain)
grouped_case = functools.cache(lambda: cases.conv_chain(groups=2))


def check(case: cases.Case, options: Options) -> None:
    """The package's step is the oracle's, and it is not the step without feedback."""
    expected = case.chain_step(options)
    if options.rollout != "off":
        without = dataclasses.replace(options, rollout="off")
        open_loop = case.chain_step(without)
        assert distance(expected.new, open_loop.new) > 1e-3, "the feedback must matter here"
    if options.feedback_clip is not None and options.rollout != "off":
        scales = expected.scales()
        assert min(scales) < 1 and max(scales) == 1, "some samples bounded, others not"
    comparison.assert_same_step(case, comparison.package_step(case, options), expected.new)


@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
@pytest.mark.parametrize("rollout", cases.ROLLOUTS)
@pytest.mark.parametrize("bellman", cases.RECURSIONS)
@pytest.mark.parametrize("terminal", cases.TERMINALS)
def test_fully_connected(terminal, bellman, rollout, preconditioner):
    options = cases.options_for(preconditioner, terminal=terminal, bellman=bellman, rollout=rollout)
    check(fc_case(), options)
    if rollout != "off":
        bounded = dataclasses.replace(options, feedback_clip=cases.CLIP[preconditioner])
        check(fc_case(), bounded)


@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS[1:])
@pytest.mark.parametrize("bellman", cases.RECURSIONS)
def test_built_from_the_gradient(bellman, preconditioner):
    """M from J_u and J_h, with decay and a bound that some entries reach."""
    for clip in (None, cases.CLIP[preconditioner]):
        options = cases.options_for(
            preconditioner,
            bellman=bellman,
            curvature="gradient",
            feedback_clip=clip,
            weight_decay=0.1,
        )
        check(fc_case(), options)
        from_value = dataclasses.replace(options, curvature="value")
        new = [fc_case().chain_step(o).new for o in (options, from_value)]
        assert (distance(*new) > 1e-4) == (bellman != "off")


@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
@pytest.mark.parametrize("rollout", ("linear", "nonlinear"))
@pytest.mark.parametrize(
    ("terminal", "bellman"),
    [
        ("matched", "share"),
        ("gauss-newton", "share"),
        ("gauss-newton", "joint"),
        ("outer-product", "literal"),
        ("gauss-newton", "sample"),
    ],
)
def test_convolutional(terminal, bellman, rollout, preconditioner):
    """Stride, padding, both poolings, a 1x1 convolution without bias: many locations."""
    for clip in (None, cases.CLIP[preconditioner]):
        options = cases.options_for(
            preconditioner, terminal=terminal, bellman=bellman, rollout=rollout, feedback_clip=clip
        )
        check(conv_case(), options)


@pytest.mark.parametrize("preconditioner", ("identity", "rmsprop", "adam"))
@pytest.mark.parametrize("terminal", cases.TERMINALS)
def test_grouped_convolution(terminal, preconditioner):
    check(grouped_case(), cases.options_for(preconditioner, terminal=terminal))


@pytest.mark.parametrize("rollout", ("linear", "nonlinear"))
@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
def test_momentum_and_weight_decay_in_one_step(preconditioner, rollout):
    """The propagated differential is that of the applied update, decay and momentum included."""
    momentum = 0.0 if preconditioner == "adam" else 0.9
    options = cases.options_for(
        preconditioner, rollout=rollout, momentum=momentum, weight_decay=0.3
    )
    plain = dataclasses.replace(options, weight_decay=0.0)
    case = fc_case()
    decayed, bare = (case.chain_step(o).new for o in (options, plain))
    assert distance(decayed, bare) > 1e-3
    check(case, options)


@pytest.mark.parametrize(
    ("preconditioner", "momentum", "weight_decay"),
    [
        ("identity", 0.9, 0.01),
        ("rmsprop", 0.0, 0.0),
        ("rmsprop", 0.9, 0.01),
        ("adam", 0.0, 0.0),
        ("adam", 0.0, 0.01),
        ("kfac", 0.9, 0.01),
        ("ekfac", 0.9, 0.01),
    ],
)
@pytest.mark.parametrize("bellman", ("share", "joint"))
def test_several_steps(bellman, preconditioner, momentum, weight_decay):
    """State that lives from step to step, on a new batch each time."""
    case = cases.fc_chain()
    options = cases.options_for(
        preconditioner,
        bellman=bellman,
        terminal="gauss-newton",
        feedback_clip=0.5,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    optimizer = comparison.optimizer_for(case.model, case.criterion, options)
    memory: dict[int, dict] = {}
    for step in range(4):
        x, y = torch.randn(3, 3), torch.randint(3, (3,))
        phi = row_losses(case.criterion, case.model(x), y)
        expected = ddp_step(case.stages, x, phi, options, memory)
        before = {p: p.detach().clone() for p in case.model.parameters()}
        comparison.train_step(optimizer, case.model, case.criterion, x, y)
        for name, p in case.model.named_parameters():
            change, want = p.detach() - before[p], expected.new[p] - before[p]
            error = float((change - want).abs().max() / want.abs().max())
            assert error < 1e-8, (step, name, error)


@pytest.mark.parametrize("preconditioner", ("kfac", "ekfac"))
def test_the_first_factors_are_the_batch_s(preconditioner):
    """However much is smoothed later, the first step's factors are those of its batch."""
    case, options = fc_case(), cases.options_for(preconditioner)
    expected = case.chain_step(options)
    kind = {"kfac": ocnopt.curvature.KFAC, "ekfac": ocnopt.curvature.EKFAC}[preconditioner]
    smoothed = kind(damping=options.damping, decay=0.95, update_every=7)
    actual = comparison.package_step(case, options, preconditioner=smoothed)
    comparison.assert_same_step(case, actual, expected.new)


@pytest.mark.parametrize("parts", ([2, 1], [1, 1, 1]))
@pytest.mark.parametrize("preconditioner", cases.PRECONDITIONERS)
@pytest.mark.parametrize("terminal", ("matched", "gauss-newton"))
def test_accumulation(terminal, preconditioner, parts):
    """Pieces of a batch, each with its share of the loss, make the whole batch's step."""
    for bellman in ("share", "joint"):
        options = cases.options_for(preconditioner, terminal=terminal, bellman=bellman)
        case = fc_case()
        expected = case.chain_step(options)
        actual = comparison.package_step(case, options, parts=parts)
        comparison.assert_same_step(case, actual, expected.new)


def test_a_batch_of_one():
    """share == sample when the sample is the batch."""
    case = cases.fc_chain()
    case = cases.Case(case.model, case.stages, case.x[:1], case.y[:1], case.criterion)
    steps = {}
    for bellman in ("share", "sample"):
        options = Options(lr=0.5, bellman=bellman, terminal="gauss-newton")
        check(case, options)
        steps[bellman] = case.chain_step(options).new
    assert distance(steps["share"], steps["sample"]) < 1e-12
