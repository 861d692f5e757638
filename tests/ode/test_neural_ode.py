"""The block itself: what it takes, what it refuses, and what it says when a solver fails."""

import copy
import io
import pickle
import re

import pytest
import torch
from ode.blocks import TIGHT, batch, classifier, gradients, make, relative, runge_kutta, timed
from torch import nn

import ocnopt
from ocnopt.errors import NonFiniteError, OcnoptError, OptionError, SolverError
from ocnopt.ode import ConcatConv2d, ConcatSquashLinear, NeuralODE, TimedSequential


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


class Function(nn.Module):
    """A field from a function of (t, x) and one weight of 1."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, t, x):
        return self.weight * self.function(t, x)


# messages of solvers that fail

ADVICE = {
    "underflow": "needs steps smaller than the numbers can tell apart",
    "not finite": "reached a value that is not finite",
    "steps": "ran out of steps",
}
NAN = [[float("nan"), 1.0]]
FAILURES = [
    # x' = 5 x^2 goes to infinity at t = 0.2, where steps shrink for ever
    ("underflow", lambda t, x: 5 * x**2, {}, [[1.0, 1.0]], "bound it.*dropout"),
    ("not finite", lambda t, x: 5 * x**2, {"method": "rk4"}, [[1e60, 1.0]], "Bound the field"),
    ("not finite", lambda t, x: 5e3 * x, {}, [[1.0, 1.0]], "Bound the field"),
    ("not finite", lambda t, x: -x, {}, NAN, "skip this batch"),
    ("not finite", lambda t, x: -x, {"method": "euler"}, NAN, "skip this batch"),
    ("not finite", lambda t, x: x / (x - x), {}, [[1.0, 1.0]], "skip this batch"),
    (
        "steps",
        lambda t, x: torch.sin(100 * x),
        {"rtol": 1e-8, "atol": 1e-8, "options": {"max_num_steps": 3}},
        [[1.0, 2.0]],
        "max_num_steps",
    ),
]


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize(("kind", "function", "options", "x", "advice"), FAILURES)
def test_failures_name_method_time_and_advice(kind, function, options, x, advice, adjoint):
    block = NeuralODE(Function(function), adjoint=adjoint, **options)
    with pytest.raises(SolverError) as caught:
        block(torch.tensor(x))
    message = str(caught.value)
    assert "NeuralODE of Function" in message
    assert options.get("method", "dopri5") in message
    assert ADVICE[kind] in message and re.search(advice, message)
    assert " at t=" in message
    assert isinstance(caught.value, NonFiniteError) and isinstance(caught.value, OcnoptError)


def test_the_time_in_the_message_is_that_of_the_failure():
    with pytest.raises(SolverError, match=r"at t=0\.2000"):
        NeuralODE(Function(lambda t, x: 5 * x**2))(torch.ones(1, 2))
    with pytest.raises(SolverError, match=r"at t=0\.79999"):
        NeuralODE(Function(lambda t, x: 5 * x**2), 1.0, 0.0)(-torch.ones(1, 2))


def test_a_field_that_jumps_comes_to_an_end(monkeypatch):
    """Its steps need not underflow: they may be tiny for ever."""
    monkeypatch.setattr("ocnopt.ode.solve.MAX_STEPS", 200)
    block = NeuralODE(Function(lambda t, x: -1e3 * x.sign()), rtol=0, atol=1e-12)
    with pytest.raises(SolverError, match=r"ran out of steps.*max_num_steps"):
        block(torch.ones(1, 2))


def test_a_backward_solve_that_fails_says_so():
    """Steps that suffice forward do not backward."""
    field, x = make("Linear")
    options = {"rtol": 1e-3, "atol": 1e-3, "adjoint_rtol": 1e-12, "adjoint_atol": 1e-12}
    block = NeuralODE(field, options={"max_num_steps": 12}, **options)
    out = block(x).sum()
    with pytest.raises(SolverError, match=r"the adjoint of NeuralODE of TimedSequential.*steps"):
        out.backward()


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_passed_on(adjoint, value):
    """As by any other layer; a loss scaler and the optimizer know what to do with it."""
    field, x = make("Linear")
    block = NeuralODE(field, adjoint=adjoint)
    x.requires_grad_()
    (block(x).sum() * value).backward()
    assert not torch.isfinite(x.grad).any()
    assert all(not torch.isfinite(p.grad).all() for p in field.parameters())


# options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "rk45"}, "method"),
        ({"rtol": -1.0}, "rtol"),
        ({"atol": float("nan")}, "atol"),
        ({"rtol": "1e-3"}, "rtol"),
        ({"rtol": 0, "atol": 0}, "rtol and atol"),
        ({"adjoint_rtol": -1.0}, "rtol"),
        ({"t1": 0.0}, "t0 and t1"),
        ({"t1": float("inf")}, "t1"),
        ({"t0": float("nan")}, "t0"),
        *(
            ({"method": "rk4", "options": {"step_size": size}}, "step_size")
            for size in (0, -0.1, "a", float("nan"), float("inf"))
        ),
    ],
)
def test_options_that_cannot_be(options, named):
    with pytest.raises(OptionError, match=named):
        NeuralODE(timed(), **options)


def test_a_field_that_is_no_module():
    with pytest.raises(OptionError, match=r"func.*nn.Module"):
        NeuralODE(lambda t, x: -x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.1),
        nn.BatchNorm1d(3),
        nn.AlphaDropout(0.2),
        nn.SyncBatchNorm(3),
        nn.MultiheadAttention(4, 2, dropout=0.5),
        nn.RReLU(),
        nn.InstanceNorm1d(3, track_running_stats=True),
    ],
)
def test_a_field_that_is_no_function(layer):
    """Refused by name, with advice; not where back-propagation is right all the same."""
    field = TimedSequential(nn.Linear(3, 3), layer, nn.Linear(3, 3))
    with pytest.raises(OptionError, match=r"layers\.1.*GroupNorm.*adjoint=False"):
        NeuralODE(field)
    NeuralODE(field, adjoint=False, method="rk4")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.0),
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
    ],
)
def test_a_field_that_is_one(layer):
    field = TimedSequential(nn.Linear(3, 3), layer.double(), nn.Tanh(), nn.Linear(3, 3))
    assert torch.isfinite(NeuralODE(field)(torch.randn(4, 3))).all()


@pytest.mark.parametrize(
    ("x", "t", "named"),
    [
        (torch.zeros(2, 3, dtype=torch.long), None, "x: expected floating-point"),
        ((), None, "x: expected"),
        (torch.zeros(2, 3), torch.tensor([0.0]), "at least two times"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0, 0.5]), "increasing or decreasing"),
        (torch.zeros(2, 3), torch.tensor([0.0, 0.0]), "no two of them equal"),
        (torch.zeros(2, 3), torch.tensor([0.0, float("nan")]), "increasing or decreasing"),
        (torch.zeros(2, 3), torch.zeros(2, 5), "5 samples, but the state has 2"),
        (torch.zeros(2, 3), torch.zeros(2, 2, 2), "times"),
    ],
)
def test_states_and_times_that_cannot_be(x, t, named):
    with pytest.raises(OptionError, match=named):
        NeuralODE(timed())(x, t)


def test_times_of_every_sample_are_not_differentiated():
    t = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    with pytest.raises(OptionError, match="not differentiated"):
        NeuralODE(timed())(torch.zeros(2, 3), t)


def test_a_field_of_the_wrong_shape():
    with pytest.raises(OptionError, match=r"returned \[\(2, 4\)\] for a state of \[\(2, 3\)\]"):
        NeuralODE(TimedSequential(nn.Linear(3, 4)))(torch.zeros(2, 3))


# as a module


def test_what_follows_may_work_in_place():
    (x, y), found = batch(), []
    for inplace in (True, False):
        model = classifier()
        model.insert(2, nn.ReLU(inplace=inplace))
        nn.functional.cross_entropy(model(x), y).backward()
        found.append(gradients(model))
    plain, other = found
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "implicit_adams"])
@pytest.mark.parametrize("adjoint", [True, False])
def test_an_empty_batch_has_an_empty_solution_and_gradients_of_zero(method, adjoint):
    """As in any layer of torch."""
    field = TimedSequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    block = NeuralODE(field, method=method, adjoint=adjoint)
    x = torch.empty(0, 3, requires_grad=True)
    for times, shape in (
        ((), (0, 3)),
        ((torch.tensor([0.0, 0.5, 1.0]),), (3, 0, 3)),
        ((torch.empty(2, 0),), (2, 0, 3)),
    ):
        block.zero_grad()
        found = block(x, *times)
        assert found.shape == shape and found.dtype == x.dtype
        found.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in field.parameters())
        with torch.no_grad():
            assert block(x, *times).shape == shape
    with pytest.raises(OptionError, match="dx/dt must be shaped as x"):
        NeuralODE(TimedSequential(nn.Linear(3, 4)))(x)


def test_an_empty_batch_of_several_tensors():
    class Field(nn.Module):
        def forward(self, t, state):
            return -state[0], state[0].sum(1)

    x, y = NeuralODE(Field())((torch.empty(0, 3), torch.empty(0)))
    assert x.shape == (0, 3) and y.shape == (0,)


def test_an_empty_micro_batch_has_no_part_in_a_step():
    models = []
    for sizes in ((8,), (8, 0), (0, 8)):
        model = classifier()
        optimizer = ocnopt.SNOpt(model, lr=0.1, sample_step=0.1, reduction="sum")
        for size in sizes:
            x, y = batch(0)
            nn.functional.cross_entropy(model(x[:size]), y[:size], reduction="sum").backward()
        optimizer.step()
        models.append(model)
    for model in models[1:]:
        for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(p, q)


def test_weights_changed_before_the_backward_pass_are_noticed():
    """The adjoint is solved with the weights as they are then; autograd's own error says so."""
    field, x = make("Linear")
    out = NeuralODE(field)(x).sum()
    with torch.no_grad():
        field.layers[2].weight.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_no_second_derivatives_without_a_word():
    field, x = make("Linear")
    x.requires_grad_()
    (g,) = torch.autograd.grad(NeuralODE(field)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize("adjoint", [True, False])
def test_without_gradients_the_same_result(adjoint):
    field, x = make("Linear")
    block = NeuralODE(field, adjoint=adjoint)
    with torch.no_grad():
        found = block(x)
    assert torch.equal(found, block(x).detach())


def test_evaluations_are_counted():
    field, x = make("Linear")
    block = NeuralODE(field, method="rk4", options={"step_size": 0.25})
    block(x).sum().backward()
    assert block.evaluations == (16, 16, 0)
    block.reset_evaluations()
    assert block.evaluations == (0, 0, 0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_not_followed(how):
    model = classifier()
    optimizer = ocnopt.SNOpt(model, lr=0.1, sample_step=0.1)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin[1].reset_evaluations()
    nn.functional.cross_entropy(twin(x), y).backward()
    assert twin[1].evaluations.sampling == 0 < twin[1].evaluations.backward
    assert optimizer._solved.statistics.samples == 8
    assert all(not p._post_accumulate_grad_hooks for p in twin.parameters())
    # The copy can be followed by an optimizer of its own.
    other = ocnopt.SNOpt(twin, lr=0.1, sample_step=0.1)
    nn.functional.cross_entropy(twin(x), y).backward()
    assert other._solved.statistics.samples == 8 == optimizer._solved.statistics.samples


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_times_are_not_rounded_to_half_precision(dtype):
    """0.7 is 0.6992 in bfloat16."""
    model = classifier(dtype, t1=0.7)
    assert float(model[1].t1) == pytest.approx(0.7, abs=1e-7)
    assert model[1].t1.dtype == (dtype if dtype.itemsize > 2 else torch.float64)
    assert all(p.dtype == dtype for p in model.parameters())
    again = classifier(dtype)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again[1].t1, model[1].t1)


def single(**options):
    """A block of single precision, though the tests are in double."""
    torch.set_default_dtype(torch.float32)
    try:
        return NeuralODE(timed(), **options)
    finally:
        torch.set_default_dtype(torch.float64)


CASTS = {
    "double": lambda block: block.double(),
    "to": lambda block: nn.Sequential(block).to(torch.float64)[0],
    "through half": lambda block: block.bfloat16().double(),
    "back and forth": lambda block: block.double().float().double(),
    "of a copy": lambda block: pickle.loads(pickle.dumps(copy.deepcopy(block))).double(),
    "of one that was loaded": lambda block: loaded(single(t0=-0.1, t1=0.7), block).double(),
}


def loaded(block, other):
    block.load_state_dict(other.state_dict())
    return block


@pytest.mark.parametrize("cast", CASTS)
def test_times_are_as_given_in_double_precision(cast):
    """0.7 is 0.699999988 in single precision, to which it had been rounded before."""
    block = single(t0=-0.1, t1=0.7)
    assert float(block.t1) != 0.7 and block.t1.dtype == torch.float32
    keys = list(block.state_dict())
    block = CASTS[cast](block)
    assert (float(block.t0), float(block.t1)) == (-0.1, 0.7)
    assert block.t1.dtype == torch.float64
    assert list(block.state_dict()) == keys


def test_times_that_were_changed_are_cast_as_they_are():
    block = single(t1=0.7)
    block.t1.fill_(0.3)
    assert float(block.double().t1) == float(torch.tensor(0.3, dtype=torch.float32))
    old = single(t1=0.7)
    del old._given  # as in a pickle of an earlier version
    assert float(old.double().t1) == float(torch.tensor(0.7, dtype=torch.float32))
    double = single(t1=0.7).double()
    double.load_state_dict(single(t1=0.7).state_dict())
    assert float(double.t1) == float(torch.tensor(0.7, dtype=torch.float32))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_half_precision_is_solved_or_named(method):
    options = {"options": {"step_size": 0.1}} if method == "rk4" else {"rtol": 1e-2, "atol": 1e-2}
    field, x = make("Linear")
    true = runge_kutta(field, x, 0.0, 1.0, 100)[-1]
    block = NeuralODE(field, method=method, **options).bfloat16()
    try:
        found = block(x.bfloat16())
        found.float().square().sum().backward()
    except SolverError as error:
        assert "float64" in str(error)
    else:
        assert found.dtype == torch.bfloat16
        # Eight bits, and a tolerance of a hundredth at every step.
        assert relative(found.double(), true) < 0.2


def test_autocast():
    """The field is cast as other modules are; gradients are close to those without."""
    (x, y), found = batch(dtype=torch.float32), []
    for on in (True, False):
        model = classifier(torch.float32, method="rk4", options={"step_size": 0.1})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        found.append(gradients(model))
    cast, plain = found
    for name, value in plain.items():
        assert cast[name].dtype == torch.float32
        assert relative(cast[name], value) < 0.05


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(ConcatSquashLinear(3, 4), (5, 3)), (ConcatConv2d(2, 3, padding=1), (5, 2, 4, 4))],
)
def test_fields_take_one_time_or_one_per_sample(layer, shape):
    layer = layer.double()
    x, t = torch.randn(shape), torch.rand(5)
    together = layer(t, x)
    alone = torch.cat([layer(t[n], x[n : n + 1]) for n in range(5)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(layer(torch.tensor(0.3), x), layer(torch.full((5,), 0.3), x))
    assert relative(layer(torch.tensor(0.9), x), layer(torch.tensor(0.1), x)) > 1e-3


def test_tight_options_are_tight():
    """The other tests rest on this."""
    field, x = make("Linear")
    assert relative(NeuralODE(field, **TIGHT)(x), runge_kutta(field, x, 0.0, 1.0, 200)[-1]) < 1e-8


class Context(nn.Module):
    """Takes along a part that never changes, whose error is therefore zero."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, t, x):
        z, c = x
        return self.outer(torch.tanh(self.inner(torch.cat([z, c], 1)))), torch.zeros_like(c)


class WithContext(nn.Module):
    def __init__(self, adjoint):
        super().__init__()
        self.encoder, self.ode = nn.Linear(3, 1), NeuralODE(Context(), adjoint=adjoint)

    def forward(self, x):
        return torch.cat(self.ode((x[:, :2], self.encoder(x))), 1)


@pytest.mark.parametrize("adjoint", [True, False])
def test_who_follows_does_not_change_the_gradient_beside_a_part_without_error(adjoint):
    found = []
    for followed in (False, True):
        torch.manual_seed(0)
        model, x = WithContext(adjoint), torch.randn(5, 3)
        optimizer = ocnopt.SNOpt(model, lr=0.01) if followed else None
        model(x).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        if optimizer is not None:
            optimizer.step()
    for plain, other in zip(*found, strict=True):
        assert bool(plain.isfinite().all())
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("name", ["SNOpt", "OCNOpt"])
def test_autocast_before_the_block(name, adjoint):
    """The state comes in bfloat16; what is looked at in the backward pass is as in the forward."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    block = NeuralODE(Untimed(field), adjoint=adjoint)
    model = nn.Sequential(nn.Linear(3, 4), block, nn.Linear(4, 2)).float()
    criterion = nn.CrossEntropyLoss()
    make = {
        "SNOpt": lambda: ocnopt.SNOpt(model, lr=0.02),
        "OCNOpt": lambda: ocnopt.OCNOpt(model, criterion, lr=0.02),
    }[name]
    optimizer = make()
    before = [p.detach().clone() for p in model.parameters()]
    for i in range(2):
        torch.manual_seed(i)
        x, y = torch.randn(5, 3, dtype=torch.float32), torch.randint(2, (5,))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Untimed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(x)


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("followed", [False, True])
def test_functional_call(adjoint, followed):
    """Weights that are lent for one call are those that the backward pass computes with."""
    torch.manual_seed(0)
    ode = NeuralODE(Untimed(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))), **TIGHT)
    ode.adjoint = adjoint
    optimizer = ocnopt.SNOpt(ode, lr=0.01) if followed else None
    x = torch.randn(4, 3, requires_grad=True)
    lent = {n: (p.detach() * 1.5).requires_grad_() for n, p in ode.named_parameters()}
    own = copy.deepcopy(ode)
    own.load_state_dict({**own.state_dict(), **{n: p.detach() for n, p in lent.items()}})
    expected = torch.autograd.grad(own(x).square().sum(), [x, *own.parameters()])
    found = torch.autograd.grad(
        torch.func.functional_call(ode, lent, (x,)).square().sum(), [x, *lent.values()]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert optimizer is None or all(p.grad is None for p in ode.parameters())
