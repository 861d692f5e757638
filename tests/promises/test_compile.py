"""torch.compile: the optimizer is built first, and whoever builds it later is told so."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_weights_close,
    assert_weights_equal,
    batch,
    images,
    mlp,
    step,
    weights,
)
from torch import nn

import ocnopt


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_and_run_before_the_optimizer_was_built():
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    criterion(compiled(x), y).backward()
    model.zero_grad()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    before = weights(model)
    criterion(compiled(x), y).backward()
    try:
        optimizer.step()
    except ocnopt.RecordingError as error:
        assert "torch.compile" in str(error)
        assert all(torch.equal(before[n], p) for n, p in weights(model).items())
    else:
        # The compiler noticed the hooks and compiled again: then they must have worked.
        assert_feedback_active(optimizer)


@pytest.mark.parametrize(
    "name,backend",
    [
        *((name, "eager") for name in OPTIMIZERS),
        ("DDPNOpt-adam", "aot_eager"),
        ("KFAC", "aot_eager"),
    ],
)
def test_optimizer_built_first(name, backend):
    model = mlp()
    plain = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    own = nn.CrossEntropyLoss()
    optimizer, reference = OPTIMIZERS[name](model, criterion), OPTIMIZERS[name](plain, own)
    compiled = torch.compile(model, backend=backend)
    for i in range(3):
        x, y = batch(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
        if name.startswith("DDPNOpt"):
            assert_feedback_active(optimizer)
    assert_weights_close(model, plain, 1e-12)


@pytest.mark.parametrize("terminal", ["outer-product", "gauss-newton"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_terminal_forms(backend, terminal):
    model = mlp()
    plain = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, terminal=terminal)
    reference = ocnopt.DDPNOpt(plain, own, lr=0.1, terminal=terminal)
    compiled = torch.compile(model, backend=backend)
    for i in range(2):
        x, y = batch(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    assert_feedback_active(optimizer)
    assert_weights_close(model, plain, 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_built_on_the_compiled_wrapper(backend):
    model = mlp()
    plain = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend=backend)
    optimizer = ocnopt.DDPNOpt(compiled, criterion, lr=0.1)
    reference = ocnopt.DDPNOpt(plain, own, lr=0.1)
    for i in range(2):
        x, y = batch(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    assert_feedback_active(optimizer)
    assert_weights_close(model, plain, 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_model_compiled_in_place(backend):
    """``model.compile()`` instead of a wrapper."""
    model = mlp()
    plain = copy.deepcopy(model)
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    reference = ocnopt.DDPNOpt(plain, own, lr=0.1)
    model.compile(backend=backend)
    for i in range(2):
        x, y = batch(seed=i)
        step(model, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    assert_feedback_active(optimizer)
    assert_weights_close(plain, model, 1e-12)


class Block(nn.Module):
    """A residual block as it is usually written: whatever can be done in place is."""

    def __init__(self, into, out):
        super().__init__()
        stride = 1 if into == out else 2
        self.first = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if into != out:
            conv = nn.Conv2d(into, out, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        x = self.second(self.relu(self.norms[0](self.first(x))))
        x = self.norms[1](x)
        x += shortcut
        return self.relu(x)


def chain():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def residual():
    """Ten normalizations: more than dynamo compiles one function for."""
    torch.manual_seed(0)
    widths = (2, 2, 4, 4, 5)
    blocks = [Block(a, b) for a, b in pairwise(widths)]
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))
    return nn.Sequential(*blocks, *pool).double()


INPLACE = {"chain": (chain, batch), "residual": (residual, images)}


def trained_alike(kind, name, backend, steps=2, **options):
    """A compiled model and one that is not, both trained, and the compiled one's optimizer."""
    make_model, make = INPLACE[kind]
    model, plain = make_model(), make_model()
    criterion, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    reference = OPTIMIZERS[name](plain, own, **options)
    compiled = torch.compile(model, backend=backend)
    for i in range(steps):
        x, y = make(seed=i)
        step(compiled, optimizer, criterion, x, y)
        step(plain, reference, own, x, y)
    if name not in ("KFAC", "EKFAC"):
        assert_feedback_active(optimizer)
    return model, plain, optimizer


@pytest.mark.parametrize("kind", INPLACE)
@pytest.mark.parametrize("name", ["DDPNOpt-identity", "DDPNOpt-ekfac", "DGNOpt", "KFAC", "EKFAC"])
def test_what_is_done_in_place_is_seen_in_every_compiled_pass(name, kind):
    model, plain, _ = trained_alike(kind, name, "aot_eager")
    assert_weights_equal(model, plain)


@pytest.mark.parametrize("kind", INPLACE)
@pytest.mark.parametrize("name", ["DDPNOpt-kfac", "DGNOpt"])
def test_compiled_in_place_without_weight_gradients(name, kind):
    model, plain, _ = trained_alike(kind, name, "aot_eager", keep_grad=False)
    assert_weights_equal(model, plain)


def test_compiled_in_place_with_the_decrease_measured():
    model, plain, optimizer = trained_alike("residual", "DGNOpt", "aot_eager", measure_every=1)
    assert_weights_equal(model, plain)
    assert optimizer.diagnostics.total.actual_decrease is not None


@pytest.mark.parametrize("kind", INPLACE)
def test_nonlinear_rollout_of_a_compiled_model_watches_a_pass_that_is_not_compiled(kind):
    name = "DDPNOpt-identity"
    torch._dynamo.utils.counters.clear()
    model, plain, _ = trained_alike(kind, name, "aot_eager", 3, rollout="nonlinear")
    assert_weights_equal(model, plain)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_each_recorded_layer_is_one_graph_break_and_no_hook_is_compiled(caplog):
    """Compiled hooks had been compiled anew for every layer, up to dynamo's limit of eight."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(caplog.handler)
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        _, _, optimizer = trained_alike("residual", "DGNOpt", "aot_eager", measure_every=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if "recompile_limit" in r.getMessage()]
    assert sum(counters["graph_break"].values()) <= len(optimizer.players) + 2


def test_without_gradients_a_compiled_model_is_one_graph():
    model, criterion = residual(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS["DDPNOpt-identity"](model, criterion)
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(images()[0])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert not optimizer.recorder.passes


def test_several_passes_back_through_what_compiled_code_gives_away_are_refused_by_name():
    options = {"name": "DDPNOpt-identity", "backend": "aot_eager", "terminal": "gauss-newton"}
    with pytest.raises(ocnopt.RecordingError, match="donated_buffer = False"):
        trained_alike("residual", **options)
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        model, plain, _ = trained_alike("residual", **options)
    assert_weights_equal(model, plain)
