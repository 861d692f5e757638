"""What the loop does besides training leaves nothing behind and disturbs nothing."""

import gc
import weakref

import pytest
import torch
from games import NETS
from promises.conformance import (
    OPTIMIZERS,
    assert_feedback_active,
    assert_updates_close,
    assert_weights_equal,
    batch,
    mlp,
    run,
    step,
    weights,
)
from torch import nn

import ocnopt


def twins(name, **options):
    """Two equal runs, one of which will be disturbed."""
    made = []
    for _ in range(2):
        model, criterion = mlp(), nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[name](model, criterion, **options)
        run(model, optimizer, 1, criterion)
        made.append((model, criterion, optimizer))
    return made


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("what", ["no_grad", "inference", "eval", "undifferentiated", "other loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forwards_that_are_not_trained_on(name, what, when):
    (model, criterion, optimizer), (plain, own, reference) = twins(name)
    a, b = batch(5, seed=8)

    def disturb():
        if what == "no_grad":
            with torch.no_grad():
                criterion(model(a), b)
        elif what == "inference":
            with torch.inference_mode():
                criterion(model(a), b)
        elif what == "eval":
            model.eval()
            with torch.no_grad():
                model(a)
            model.train()
        elif what == "undifferentiated":
            model(a)
        else:
            criterion(model(a), b)

    x, y = batch(seed=2)
    optimizer.zero_grad()
    if when == "before":
        disturb()
    loss = criterion(model(x), y)
    if when == "between":
        disturb()
    loss.backward()
    if when == "after":
        disturb()
    optimizer.step()
    step(plain, reference, own, x, y)
    if name.startswith("DDPNOpt"):
        assert_feedback_active(optimizer)
    assert_weights_equal(model, plain)


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.refs = []

    def forward(self, x):
        for layer in self.body:
            x = layer(x)
            self.refs.append(weakref.ref(x))
        return x


@pytest.mark.parametrize("options", [{}, {"terminal": "gauss-newton"}], ids=["rank1", "rankr"])
@pytest.mark.parametrize("calls", ["model", "criterion"])
@pytest.mark.parametrize("name", ["DDPNOpt-identity", "DDPNOpt-kfac"])
def test_a_pass_never_differentiated_is_freed(name, calls, options):
    model = Spy()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    x, y = batch()
    out = model(x)
    loss = criterion(out, y) if calls == "criterion" else None
    inner = model.refs[:-1]
    del out, loss
    if options:
        # Of rank r the last pass is kept for a call of the criterion, until that cannot come.
        step(model, optimizer, criterion, x, y)
    gc.collect()
    alive = [i for i, r in enumerate(inner) if r() is not None]
    assert not alive, alive
    step(model, optimizer, criterion, x, y)


@pytest.mark.parametrize("options", [{}, {"terminal": "gauss-newton"}], ids=["rank1", "rankr"])
@pytest.mark.parametrize("calls", ["model", "criterion"])
def test_many_passes_never_differentiated(calls, options):
    """A validation loop that forgot no_grad: at most the last pass is alive.

    Of rank r, calls of the model alone could all belong to one criterion that is yet to be called.
    """
    model = Spy()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, **options)
    x, y = batch()
    for _ in range(5):
        out = model(x)
        if calls == "criterion":
            criterion(out, y)
    del out
    gc.collect()
    alive = [i for i, r in enumerate(model.refs) if r() is not None]
    if not options or calls == "criterion":
        assert all(i >= 4 * len(model.body) for i in alive), alive
    step(model, optimizer, criterion, x, y)
    gc.collect()
    assert not [i for i, r in enumerate(model.refs) if r() is not None]
    assert_feedback_active(optimizer)


@pytest.mark.parametrize("where", ["before loss", "before backward", "after step"])
@pytest.mark.parametrize(
    "name,options",
    [
        *((name, {}) for name in OPTIMIZERS),
        ("DDPNOpt-identity", {"terminal": "gauss-newton"}),
        ("DDPNOpt-identity", {"rollout": "nonlinear"}),
    ],
    ids=str,
)
def test_zero_grad_anywhere(name, options, where):
    """Loops differ in where they call it; any place before backward or after step is the same."""
    (model, criterion, optimizer), (plain, own, reference) = twins(name, **options)
    optimizer.zero_grad()
    for i in (2, 3):
        x, y = batch(seed=i)
        out = model(x)
        if where == "before loss":
            optimizer.zero_grad()
        loss = criterion(out, y)
        if where == "before backward":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if where == "after step":
            optimizer.zero_grad()
        step(plain, reference, own, x, y)
    if name.startswith("DDPNOpt"):
        assert_feedback_active(optimizer)
    assert_weights_equal(model, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_kept_after_the_step(name):
    model = Spy()
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    x, y = batch()
    step(model, optimizer, criterion, x, y)
    gc.collect()
    assert not [i for i, r in enumerate(model.refs) if r() is not None]


def left_to_the_collector(act):
    """Tensors that are still there after ``act()`` only because they know one another."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        act()
        gc.collect()
        return [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize(
    "name,options",
    [
        *((name, {}) for name in OPTIMIZERS),
        ("DDPNOpt-identity", {"terminal": "gauss-newton"}),
        ("DDPNOpt-identity", {"terminal": "full"}),
        ("DDPNOpt-identity", {"bellman": "joint"}),
        ("DDPNOpt-identity", {"rollout": "nonlinear"}),
        ("DDPNOpt-identity", {"keep_policy": True}),
        ("DDPNOpt-ekfac", {"measure_every": 1}),
        ("DDPNOpt-ekfac", {"keep_grad": False}),
    ],
    ids=str,
)
def test_a_step_is_freed_with_its_last_name(name, options):
    """No cycles: memory would wait for Python's collector, which small networks' steps call."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    run(model, optimizer, 2, criterion)
    assert not left_to_the_collector(lambda: run(model, optimizer, 2, criterion))


@pytest.mark.parametrize("information", ["open-loop", "feedback", "group-rational"])
@pytest.mark.parametrize("kind", ["adam", "kfac", "ekfac"])
@pytest.mark.parametrize("net", NETS)
def test_a_step_of_a_game_is_freed_with_its_last_name(net, kind, information):
    torch.manual_seed(0)
    model, criterion = NETS[net](), nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(
        model, criterion, lr=1e-3, preconditioner=kind, information=information
    )
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    step(model, optimizer, criterion, x, y)
    assert not left_to_the_collector(lambda: step(model, optimizer, criterion, x, y))


@pytest.mark.parametrize("probe", ["input", "output", "weights", "penalty graph", "columns"])
@pytest.mark.parametrize(
    "name,options",
    [
        *((name, {}) for name in OPTIMIZERS),
        ("DDPNOpt-identity", {"rollout": "nonlinear"}),
        ("DDPNOpt-identity", {"terminal": "gauss-newton"}),
    ],
    ids=str,
)
def test_gradients_the_user_asks_for(name, options, probe):
    """``torch.autograd.grad`` between forward and backward is none of the optimizer's business."""
    (model, criterion, optimizer), (plain, own, reference) = twins(name, **options)
    x, y = batch(seed=2)
    optimizer.zero_grad()
    x_in = x.clone().requires_grad_(probe in ("input", "penalty graph"))
    out = model(x_in)
    loss = criterion(out, y)
    if probe == "input":
        torch.autograd.grad(loss, x_in, retain_graph=True)
    elif probe == "output":
        torch.autograd.grad(loss, out, retain_graph=True)
    elif probe == "weights":
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    elif probe == "penalty graph":
        torch.autograd.grad(loss, x_in, create_graph=True)
    else:
        for i in range(3):
            torch.autograd.grad(out[:, i].sum(), model[0].weight, retain_graph=True)
    loss.backward()
    optimizer.step()
    step(plain, reference, own, x, y)
    if name.startswith("DDPNOpt"):
        assert_feedback_active(optimizer)
    assert_updates_close(weights(mlp()), model, plain, 1e-11)


@pytest.mark.parametrize("terminal", ["bounded", "matched", "outer-product", "gauss-newton"])
@pytest.mark.parametrize("bellman", ["share", "joint"])
@pytest.mark.parametrize("name", ["identity", "adam", "kfac", "ekfac"])
def test_backward_twice_adds_up(name, bellman, terminal):
    """Twice through a retained graph is once through twice the loss."""
    options = {"bellman": bellman, "terminal": terminal}
    (model, criterion, optimizer), (plain, own, reference) = twins(f"DDPNOpt-{name}", **options)
    start = weights(model)
    x, y = batch(seed=2)
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert_feedback_active(optimizer)
    reference.zero_grad()
    (2 * own(plain(x), y)).backward()
    reference.step()
    assert_updates_close(start, model, plain, 1e-10)


def test_gradient_penalty_trains():
    """A loss that holds a gradient itself (double backward) still steps, feedback or not."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x, y = batch()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        x_in = x.clone().requires_grad_()
        loss = criterion(model(x_in), y)
        (slope,) = torch.autograd.grad(loss, x_in, create_graph=True)
        total = loss + 0.1 * slope.square().sum()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_without_gradients_does_nothing(name):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, weight_decay=0.1)
    before = weights(model)
    optimizer.step()
    assert_weights_equal(before, model)
    run(model, optimizer, 1, criterion)
    before = weights(model)
    optimizer.zero_grad()
    optimizer.step()
    assert_weights_equal(before, model)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n.startswith("DDPNOpt")])
def test_step_twice_without_a_new_pass_is_refused(name):
    """The gradients are still there but what led to them is used up."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    run(model, optimizer, 1, criterion)
    before = weights(model)
    with pytest.raises(ocnopt.RecordingError):
        optimizer.step()
    assert_weights_equal(before, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_activation_checkpointing(name):
    """Layers that run again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.body, self.on = mlp(), on

        def forward(self, x):
            x = self.body[:2](x)
            x = checkpoint(self.body[2:4], x, use_reentrant=False) if self.on else self.body[2:4](x)
            return self.body[4](x)

    ended = []
    for on in (True, False):
        model, criterion = Saving(on), nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[name](model, criterion)
        run(model, optimizer, 3, criterion)
        if name.startswith("DDPNOpt"):
            assert_feedback_active(optimizer)
        ended.append(model)
    start = weights(Saving(False))
    assert_updates_close(start, ended[0], ended[1], 1e-11)


@pytest.mark.parametrize("seen", ["as it is", "view", "transposed", "changed"])
def test_actual_decrease_is_measured_on_what_the_criterion_saw(seen):
    """Views of the model's output are followed; where the loop computes, nothing is claimed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, measure_every=1)
    x = torch.randint(10, (4, 7))

    def loss():
        out, y = model(x), x
        if seen == "view":
            out, y = out.view(-1, 10), y.view(-1)
        elif seen == "transposed":
            out = out.transpose(1, 2)
        else:
            out, y = out[:, 0] if seen == "as it is" else out[:, 0] * 2, y[:, 0]
        return criterion(out, y)

    optimizer.zero_grad()
    before = loss()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = loss()
    actual = optimizer.diagnostics.total.actual_decrease
    if seen == "changed":
        assert actual is None
    else:
        assert actual == pytest.approx(float(before - after), abs=1e-6)
        assert actual > 0


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_the_loops(name, options):
    """A step works in tensors of its own: what it reads may be read again after it."""
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion, **options)
    for i in range(2):
        x, y = batch(seed=i)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        kept = [p.grad.clone() for p in model.parameters()]
        state = {id(v): v.clone() for s in optimizer.state.values() for v in tensors(s)}
        held = [v for s in optimizer.state.values() for v in tensors(s)]
        optimizer.step()
        assert all(torch.equal(a, p.grad) for a, p in zip(kept, model.parameters(), strict=True))
        assert all(torch.equal(state[id(v)], v) for v in held)


def tensors(state):
    return [v for v in state.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("keep_grad", [True, False])
@pytest.mark.parametrize("what", ["vmap of jacrev", "hessian", "jit.trace"])
def test_what_is_transformed_or_traced_is_none_of_its_business(what, keep_grad):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    plain = mlp()
    optimizer = OPTIMIZERS["DDPNOpt-identity"](model, criterion, keep_grad=keep_grad)
    run(model, optimizer, 1, criterion)
    plain.load_state_dict(model.state_dict())
    x, y = batch()

    def look(network):
        if what == "vmap of jacrev":
            return torch.func.vmap(torch.func.jacrev(network))(x)
        if what == "hessian":
            return torch.func.hessian(lambda z: network(z).square().sum())(x[0])
        return torch.jit.trace(network, x)(x)

    torch.testing.assert_close(look(model), look(plain))
    assert all(p.requires_grad for p in model.parameters())
    step(model, optimizer, criterion, x, y)
    assert_feedback_active(optimizer)
