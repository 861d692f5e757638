"""The integration time: derivatives, a toy whose best time is known, bounds, resume."""

# ruff: noqa: SIM300 (Q_T is no constant)

import gc

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.errors import NonFiniteError, OptionError
from ocnopt.ode import IntegrationTime, NeuralODE


class Field(nn.Module):
    """A field of both arguments, with weights."""

    def __init__(self, width=3):
        super().__init__()
        self.inner = nn.Linear(width + 1, 6)
        self.outer = nn.Linear(6, width)

    def forward(self, t, x):
        return self.outer(torch.tanh(self.inner(torch.cat([x, t.expand(len(x), 1)], 1))))


class Drift(nn.Module):
    """dx/dt = speed."""

    def __init__(self, speed=1.0):
        super().__init__()
        self.speed = nn.Parameter(torch.tensor(float(speed)))

    def forward(self, t, x):
        return self.speed.expand_as(x)


def exact(func, **options):
    if isinstance(func, Drift):  # one step is exact
        return NeuralODE(func, method="euler", **options).double()
    return NeuralODE(func, rtol=1e-9, atol=1e-9, **options).double()


def loss_of(ode, x):
    return ode(x).pow(3).sum(1).mean()


@pytest.mark.parametrize("adjoint", [True, False])
def test_row_44_the_derivative_equals_a_finite_difference(adjoint):
    torch.manual_seed(0)
    ode = exact(Field(), t0=0.2, t1=1.1, adjoint=adjoint)
    x = torch.randn(5, 3, dtype=torch.float64)
    horizon = IntegrationTime(ode, lr=1e-12, penalty=0.7, rule="first-order", every=1)
    loss_of(ode, x).backward()
    change = horizon.step()
    losses = []
    for t1 in (1.1 + 1e-5, 1.1 - 1e-5):
        ode.t1.fill_(t1)
        with torch.no_grad():
            losses.append(float(loss_of(ode, x)))
    slope = (losses[0] - losses[1]) / 2e-5
    # The penalty c / 2 (t1 - t0)^2 is added once (not times the field, not times the batch).
    assert change.Q_T == pytest.approx(slope + 0.7 * 0.9, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_row_44_the_curvature_is_that_of_samples_however_the_batch_is_cut(parts):
    torch.manual_seed(1)
    ode = exact(Field())
    x = torch.randn(6, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(ode.parameters(), lr=0.0)
    horizon = IntegrationTime(ode, optimizer, penalty=0.3, every=1)
    for part in x.chunk(parts):
        (loss_of(ode, part) / parts).backward()
    optimizer.step()
    own = []
    for row in x:  # every sample's own derivative, by the field at its own end
        with torch.no_grad():
            end = ode(row[None])
        end.requires_grad_()
        gradient = torch.autograd.grad(end.pow(3).sum(), end)[0]
        own.append((gradient * ode.func(ode.t1, end)).sum().detach())
    own = torch.stack(own)
    change = horizon.step()
    assert change.Q_T == pytest.approx(0.3 + float(own.mean()), rel=1e-6)
    assert change.Q_TT == pytest.approx(0.3 + float(own.square().mean()), rel=1e-6)


def test_row_44_feedback_answers_the_change_of_the_weights():
    """-lr / Q_TT * s * Q_u^T dtheta, and s Q_u is close to the exact mixed derivative."""
    torch.manual_seed(2)
    ode = exact(Field())
    # One sample, and a loss that is a square: rank one is then close to exact (methods 4.8).
    x = torch.randn(1, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(ode.parameters(), lr=0.05)
    horizon = IntegrationTime(ode, optimizer, lr=0.5, penalty=0.2, every=1)
    loss_of(ode, x).backward()
    old = [p.detach().clone() for p in ode.parameters()]
    gradients = [p.grad.clone() for p in ode.parameters()]
    optimizer.step()
    moved = sum(
        float((g * (p.detach() - o)).sum())
        for g, p, o in zip(gradients, ode.parameters(), old, strict=True)
    )
    change = horizon.step()
    s = change.Q_T - 0.2
    assert change.feedback == pytest.approx(-0.5 / change.Q_TT * s * moved, rel=1e-9)
    assert change.open_loop == pytest.approx(-0.5 / change.Q_TT * change.Q_T, rel=1e-12)
    assert change.time == pytest.approx(1 + change.open_loop + change.feedback, rel=1e-9)


@pytest.mark.parametrize("rule", ["feedback", "first-order"])
def test_row_44_a_toy_with_a_known_best_time_converges_to_it(rule):
    """x(T) = x0 + T and loss E[(x(T) - 2)^2] / 2: the best time is 2 / (1 + c) for E[x0] = 0."""
    torch.manual_seed(3)
    ode = exact(Drift())
    ode.func.speed.requires_grad_(False)
    bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([bias], lr=0.0)
    horizon = IntegrationTime(ode, optimizer, lr=0.2, penalty=0.1, rule=rule, every=5, decay=0.8)
    for _ in range(400):
        x = torch.randn(64, 1, dtype=torch.float64)
        x = x - x.mean() + bias
        optimizer.zero_grad()
        ((ode(x) - 2).square().mean() / 2).backward()
        optimizer.step()
        horizon.step()
    assert float(ode.t1) == pytest.approx(2 / 1.1, abs=1e-3)


def test_the_square_of_the_batch_vanishes_where_that_of_samples_does_not():
    """At a small penalty the batch's own square leaves no curvature, and the time is thrown about.

    The true curvature of the toy is 1 + c; that of samples is var(x0) + s^2 + c, here 1 and more.
    """
    ends = {}
    for curvature in ("sample", "batch"):
        torch.manual_seed(4)
        ode = exact(Drift())
        ode.func.speed.requires_grad_(False)
        bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([bias], lr=0.0)
        horizon = IntegrationTime(
            ode, optimizer, lr=0.5, penalty=1e-3, every=1, decay=0.0, curvature=curvature
        )
        times = []
        for _ in range(60):
            x = torch.randn(64, 1, dtype=torch.float64)
            ((ode(x - x.mean() + bias) - 2).square().mean() / 2).backward()
            horizon.step()
            times.append(float(ode.t1))
        ends[curvature] = max(abs(t - 2 / 1.001) for t in times[-20:])
    assert ends["sample"] < 1e-3
    assert ends["batch"] > 0.1


def test_the_time_is_bounded_below():
    ode = exact(Drift(), t0=0.5, t1=1.0)
    horizon = IntegrationTime(ode, lr=100.0, penalty=1.0, rule="first-order", every=1, minimum=0.3)
    ode(torch.ones(2, 1, dtype=torch.float64)).sum().backward()
    assert horizon.step().time == pytest.approx(0.8)
    assert float(ode.t1) == pytest.approx(0.8)


def test_changes_come_every_so_often():
    ode = exact(Drift())
    horizon = IntegrationTime(ode, lr=0.01, rule="first-order", every=3)
    changes = []
    for _ in range(7):
        ode(torch.ones(2, 1, dtype=torch.float64)).mean().backward()
        changes.append(horizon.step())
    assert [change is not None for change in changes] == [False, False, True] * 2 + [False]


def train(ode, optimizer, horizon, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss_of(ode, x).square().backward()
        optimizer.step()
        horizon.step()


def test_a_run_resumes_bit_for_bit(tmp_path):
    def build():
        torch.manual_seed(5)
        ode = exact(Field())
        optimizer = ocnopt.SNOpt(ode, lr=0.02, update_every=4, sample_step=0.25)
        return ode, optimizer, IntegrationTime(ode, optimizer, every=3, lr=0.3)

    straight = build()
    train(*straight, 5, 0)
    saved = [part.state_dict() for part in straight]
    torch.save(saved, tmp_path / "run.pt")
    train(*straight, 5, 1)
    resumed = build()
    for part, state in zip(
        resumed, torch.load(tmp_path / "run.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(*resumed, 5, 1)
    assert float(straight[0].t1) != 1.0
    for name, value in straight[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name])


def test_solves_to_other_times_are_not_counted():
    ode = exact(Drift())
    horizon = IntegrationTime(ode, rule="first-order", every=1)
    times = torch.tensor([0.0, 0.4], dtype=torch.float64)
    ode(torch.ones(2, 1, dtype=torch.float64), times).sum().backward()
    assert horizon.step() is None


def test_a_derivative_that_is_not_finite_leaves_the_time():
    ode = exact(Drift())
    horizon = IntegrationTime(ode, rule="first-order", every=1)
    # As a backward pass would tell it.
    end, nan = torch.ones(2, 1), torch.full((2, 1), float("nan"))
    horizon.arrived(0, lambda t, x: x, ode.t1, (end,), (nan,))
    with pytest.raises(NonFiniteError, match="t1 stays at 1"):
        horizon.step()
    assert float(ode.t1) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"rule": "third"}, "rule='third'"),
        ({"every": 0}, "every=0"),
        ({"minimum": 2.0}, "less than minimum=2"),
        ({"rule": "feedback"}, "pass it as the second argument"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        IntegrationTime(exact(Drift()), **{"rule": "first-order", **options})
    with pytest.raises(OptionError, match="pass the block"):
        IntegrationTime(nn.Linear(1, 1), rule="first-order")


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize(
    "when", ["before zero_grad", "after backward", "a batch is skipped", "skipped in place"]
)
def test_passes_that_no_step_came_of_do_not_count(when, adjoint):
    """Saliency maps, adversarial examples, batches that are skipped."""
    found = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        ode = exact(Field(), adjoint=adjoint)
        optimizer = ocnopt.SNOpt(ode, lr=0.01)
        horizon = IntegrationTime(ode, optimizer, every=1)
        for _ in range(3):
            x = torch.randn(5, 3, dtype=torch.float64)
            other = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
            if disturbed and when == "a batch is skipped":
                optimizer.zero_grad()
                loss_of(ode, other).backward()
            if disturbed and when == "before zero_grad":
                torch.autograd.grad(loss_of(ode, other), other)
            if disturbed and when == "skipped in place":
                loss_of(ode, other).backward()
                ode.zero_grad(set_to_none=False)
            else:
                optimizer.zero_grad()
            loss_of(ode, x).backward()
            if disturbed and when == "after backward":
                torch.autograd.grad(loss_of(ode, other), other)
            optimizer.step()
            horizon.step()
        found.append(horizon.last)
    assert found[0] == found[1]


def test_micro_batches_count_and_so_does_a_field_without_weights():
    """Without trained weights nothing tells which passes a step came of: all count."""
    for func in (Field(), Drift()):
        changes = []
        for parts in (1, 2):
            torch.manual_seed(0)
            ode = exact(func)
            for p in ode.func.parameters():
                p.requires_grad_(isinstance(func, Field))
                p.grad = None
            horizon = IntegrationTime(ode, rule="first-order", every=1)
            x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
            for part in x.chunk(parts):
                (loss_of(ode, part) / parts).backward()
            changes.append(horizon.step().Q_T)
        assert changes[0] == pytest.approx(changes[1], rel=1e-6)


def test_nothing_is_left_on_the_weights():
    for how in ("removed", "forgotten"):
        ode = exact(Field())
        horizon = IntegrationTime(ode, rule="first-order", every=1)
        loss_of(ode, torch.randn(5, 3, dtype=torch.float64)).backward()
        horizon.step()
        assert all(p._post_accumulate_grad_hooks for p in ode.func.parameters())
        if how == "removed":
            horizon.remove()
        del horizon
        gc.collect()
        assert not any(p._post_accumulate_grad_hooks for p in ode.func.parameters())
