"""Whether a loop threw gradients away, and how often a device is asked for it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ocnopt
from ocnopt.control.sampled import SAMPLE, sample_of, thrown_away


class Questions(TorchDispatchMode):
    """Counts how often a number is asked for, which waits for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def graded(count, size=3):
    """Parameters with gradients, and samples of those."""
    params = [nn.Parameter(torch.ones(size)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(size)
    return params, {p: sample_of(p) for p in params}


@pytest.mark.parametrize("count", [1, 20])
def test_as_many_questions_for_any_number_of_parameters(count):
    params, samples = graded(count)
    with Questions() as questions:
        assert not thrown_away(params, samples)
    assert questions.count == 1
    for p in params:
        p.grad.zero_()
    with Questions() as questions:
        assert thrown_away(params, samples)
    assert questions.count == 3
    for p in params:
        p.grad = None
    with Questions() as questions:
        assert thrown_away(params, samples)
    assert questions.count == 0


@pytest.mark.parametrize("depth", [1, 9])
def test_as_many_questions_for_any_number_of_layers(depth):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    criterion(model(torch.randn(6, 4)), torch.arange(6) % 4).backward()
    with Questions() as questions:
        optimizer.recorder._forget_thrown_away()
    assert questions.count == 1 and optimizer.recorder.passes
    for p in model.parameters():
        p.grad.zero_()
    with Questions() as questions:
        optimizer.recorder._forget_thrown_away()
    assert questions.count == 3 and not optimizer.recorder.passes


def test_what_a_sample_does_not_show_is_looked_for():
    """Of a large gradient that was masked to one entry, a few entries may all be zero."""
    params, samples = graded(1, 100 * SAMPLE)
    (p,) = params
    p.grad.zero_()
    place = next(i for i in range(p.numel()) if not sees(p, i))
    p.grad[place] = 1.0
    assert not thrown_away(params, samples)


def sees(p, place):
    p.grad[place] = 1.0
    seen = bool(sample_of(p).any())
    p.grad[place] = 0.0
    return seen


def test_gradients_that_were_zero_all_along_are_not_thrown_away():
    params, _ = graded(2)
    for p in params:
        p.grad.zero_()
    assert not thrown_away(params, {p: sample_of(p) for p in params})
    params[0].grad = None
    assert not thrown_away(params, {p: torch.zeros(3) for p in params})


def test_sparse_gradients():
    params, _ = graded(1)
    params[0].grad = torch.tensor([0.0, 2.0, 0.0]).to_sparse()
    samples = {params[0]: sample_of(params[0])}
    assert not thrown_away(params, samples)
    params[0].grad.zero_()
    assert thrown_away(params, samples)
