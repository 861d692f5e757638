"""Memory of a solve and its gradient does not grow with the solver's steps."""

import pytest
import torch
from ode.blocks import timed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocnopt.ode import NeuralODE


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


def saved_bytes(block, x):
    """What autograd keeps from the forward to the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return total


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


class Gather:
    """Looks at the adjoint and keeps nothing."""

    def __init__(self, step):
        self.sample_step, self.points = step, 0

    def arrived(self, *_):
        pass

    def sample(self, *_):
        self.points += 1


def peak_bytes(adjoint, tolerance, gather=None):
    torch.manual_seed(0)
    field, x = timed(6, 8), torch.randn(16, 6, requires_grad=True)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(3)
    block = NeuralODE(field, 0.0, 1.5, adjoint=adjoint, rtol=tolerance, atol=tolerance)
    if gather is not None:
        block.follow(gather)
    with Peak() as peak:
        block(x).square().sum().backward()
    return peak.most, block.evaluations, saved_bytes(block, x)


def test_row_40_memory_does_not_grow_with_steps():
    """Between tolerances of 1e-3 and 1e-7 the solver takes many more steps and no more memory."""
    loose, few, loose_saved = peak_bytes(True, 1e-3)
    tight, many, tight_saved = peak_bytes(True, 1e-7)
    assert many.forward > 2.5 * few.forward and many.backward > 2.5 * few.backward
    assert tight <= 1.1 * loose
    assert tight_saved == loose_saved


def test_row_40_nor_when_statistics_are_gathered():
    first, second = Gather(0.02), Gather(0.02)
    loose, _, loose_saved = peak_bytes(True, 1e-3, first)
    tight, _, tight_saved = peak_bytes(True, 1e-7, second)
    assert first.points == second.points == 75
    assert tight <= 1.1 * loose
    assert tight_saved == loose_saved
    # Nor with the number of points.
    coarse, _, _ = peak_bytes(True, 1e-3, Gather(0.1))
    assert loose <= 1.1 * coarse


def test_row_40_back_propagation_does_grow():
    """The measurement can tell."""
    loose, _, loose_saved = peak_bytes(False, 1e-3)
    tight, _, tight_saved = peak_bytes(False, 1e-7)
    assert tight > 2 * loose and tight_saved > 2 * loose_saved
